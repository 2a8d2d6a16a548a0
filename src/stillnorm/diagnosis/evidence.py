"""What the rules read: the model's layers and modes and, with batches, what its forwards showed.

Three forwards over the same batches, each in eval mode but for the norms themselves:

- the **eval flow**, running statistics everywhere: what the user ships;
- the **batch flow**, batch statistics wherever `train()` would use them: what was trained, and
  what running statistics estimate;
- the **recalibrated** flow, the eval flow after `recalibrate` on these batches: what that repairs.

They are run once, shared by all rules, and leave the model as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader

from stillnorm.calibration import recalibrate
from stillnorm.diagnosis.causes import Causes
from stillnorm.diagnosis.measure import (
    Distance,
    Samples,
    batch_noise,
    distance,
    samples_of,
)
from stillnorm.errors import BatchError, CalibrationError
from stillnorm.norms import Modes, NormLayer, find_norms, probe_modes
from stillnorm.state import preserved
from stillnorm.tracing import Call, Forward, Trace, batch_size, each_batch, trace

Score = Callable[[Any, Any], float]
Flow = Literal["eval", "batch", "recalibrated"]


MATTERS = 0.05
SENSITIVE = 1 / 3  # of the thresholds, once the user's own score says that statistics are stale


class CannotTell(Exception):
    """Raised by a rule that cannot be decided here; the message is the reason in the report."""


@dataclass(frozen=True)
class Head:
    """The user's own score, higher is better, three ways.

    Args:
        eval: With running statistics: what ships.
        batch: With batch statistics: what was trained.
        recalibrated: With statistics re-estimated on the same batches; None where nothing could be.
    """

    eval: float
    batch: float
    recalibrated: float | None

    def matters(self, difference: float) -> bool:
        """Tell a gain from what other samples might have shown: five points, or five percent."""
        scores = [s for s in (self.eval, self.batch, self.recalibrated) if s is not None]
        fractions = all(0 <= score <= 1 for score in scores)
        return difference > MATTERS * (1 if fractions else max(map(abs, scores)))

    @property
    def recalibration_pays(self) -> bool:
        """Whether recalibrating raises the score by what matters."""
        return self.recalibrated is not None and self.matters(self.recalibrated - self.eval)


@dataclass(frozen=True, eq=False)
class Runs:
    """What the forwards showed.

    Args:
        batches: The batches that were run.
        batch_sizes: Samples in each.
        traces: By flow; no ``"recalibrated"`` where there was nothing to recalibrate.
        head: The scores, or None without `score`.
        called: The modules in order of their first call in the eval flow.
        after: By path: running mean and variance after recalibration.
        loader: The DataLoader they came from, or None.
        total: How many batches it has, where it knows.
        forward: How the user calls the model.
    """

    batches: tuple[object, ...]
    batch_sizes: tuple[int, ...]
    traces: dict[Flow, Trace]
    head: Head | None
    called: tuple[nn.Module, ...]
    after: dict[str, tuple[Tensor, Tensor]]
    forward: Forward | None
    loader: DataLoader[object] | None = None
    total: int | None = None


class Evidence:
    """Everything that rules look at. Numbers per layer are computed when first asked for.

    Args:
        model: The model, for rules that call it; they leave it as it was.
        runs: What its forwards showed; None without batches.
    """

    def __init__(self, model: nn.Module, runs: Runs | None) -> None:
        self.model = model
        self.layers: tuple[NormLayer, ...] = find_norms(model)
        self.modes: Modes = probe_modes(model)
        self.runs = runs
        self.causes = Causes()
        self._samples: dict[tuple[str, Flow], Samples | None] = {}
        self._distances: dict[tuple[str, Flow], Distance | None] = {}

    @property
    def measured(self) -> Runs:
        """What the forwards showed, for rules that need it."""
        if self.runs is None:
            raise CannotTell("needs batches")
        return self.runs

    # ------------------------------------------------------------------ order and modes

    @cached_property
    def order(self) -> list[nn.Module]:
        """The norms and the modules that own parameters, each before those that it can feed.

        In order of their first call, or without batches in order of registration.
        """
        modules = self.runs.called if self.runs is not None else tuple(self.model.modules())
        norms = {layer.module for layer in self.layers}
        return [m for m in modules if m in norms or any(True for _ in m.parameters(recurse=False))]

    def in_train(self, layer: NormLayer) -> bool:
        """Tell which flag `training` the layer would have after `model.train()`."""
        return self.modes.in_train[layer.module]

    def is_held(self, layer: NormLayer) -> bool:
        """Tell whether something keeps the layer frozen through `model.train()`."""
        return self.modes.held_by(layer) is not None

    def trains_by_batch(self, layer: NormLayer) -> bool:
        """Tell whether the layer would normalise by the batch after `model.train()`."""
        return layer.normalizes_by(self.in_train(layer)) == "batch"

    def singled_out(self, layer: NormLayer) -> bool:
        """Tell whether the layer is in eval now while the module around it trains."""
        parent = layer.ancestors[-1] if layer.ancestors else None
        return parent is not None and parent.training and not layer.module.training

    # ------------------------------------------------------------------ calls

    def calls(self, layer: NormLayer, flow: Flow = "eval") -> tuple[Call, ...]:
        """Return the layer's calls in one flow; none without batches."""
        return self._calls.get((layer.path, flow), ())

    @cached_property
    def _calls(self) -> dict[tuple[str, Flow], tuple[Call, ...]]:
        """The calls by layer and flow, sorted once."""
        traces = {} if self.runs is None else self.runs.traces
        found: dict[tuple[str, Flow], list[Call]] = {}
        for flow, seen in traces.items():
            for call in seen.calls:
                found.setdefault((call.path, flow), []).append(call)
        return {key: tuple(calls) for key, calls in found.items()}

    def where(self, *layers: NormLayer) -> tuple[str, ...]:
        """Return the source lines that call the layers, in order of the forward."""
        calls = [call for layer in layers for call in self.calls(layer) if call.batch == 0]
        sites = (str(call.site) for call in sorted(calls, key=lambda call: call.order) if call.site)
        return tuple(dict.fromkeys(sites))

    def in_order(self, layers: Sequence[NormLayer]) -> list[NormLayer]:
        """Return the layers in order of their first call; those never called stay at the end."""

        def first(layer: NormLayer) -> float:
            return min((call.order for call in self.calls(layer)), default=math.inf)

        return sorted(layers, key=first)

    def from_here(self, paths: Collection[str]) -> tuple[str, ...]:
        """Return the paths and those of all layers that are called after the first of them."""
        layers = [layer.path for layer in self.in_order(self.layers)]
        return tuple(layers[min(map(layers.index, paths)) :])

    # ------------------------------------------------------------------ numbers

    def samples(self, layer: NormLayer, flow: Flow) -> Samples | None:
        """Return what the layer received in one flow, a row per sample."""
        key = (layer.path, flow)
        if key not in self._samples:
            sizes = self.runs.batch_sizes if self.runs is not None else ()
            self._samples[key] = samples_of(self.calls(layer, flow), sizes)
        return self._samples[key]

    def distance(self, layer: NormLayer, flow: Flow) -> Distance | None:
        """Measure how far the layer's running statistics are from what it received in a flow.

        In the recalibrated flow they are the recalibrated ones.
        """
        key = (layer.path, flow)
        if key not in self._distances:
            mean, var = layer.running_mean, layer.running_var
            if flow == "recalibrated" and self.runs is not None:
                mean, var = self.runs.after.get(layer.path, (mean, var))
            self._distances[key] = distance(
                mean,
                var,
                layer.eps,
                self.samples(layer, flow),
                instance=layer.family == "instance",
            )
        return self._distances[key]

    def mismatched(self, layer: NormLayer) -> bool:
        """Tell whether the layer's own running statistics do not describe these data.

        The batch flow decides, because batch statistics are what running ones estimate, and because
        there an error upstream does not spread: every layer before this one normalises afresh. The
        eval flow has to show half as much, where it can be measured: very small batches distort the
        batch flow itself, and that is no fault of the statistics. Single samples, which batch norm
        turns into instance norm, distort it so much that the eval flow has to agree in full.

        Many small errors add up: where recalibration raises the user's score, a third is enough.
        """
        own, felt = self.distance(layer, "batch"), self.distance(layer, "eval")
        head = None if self.runs is None else self.runs.head
        part = SENSITIVE if head is not None and head.recalibration_pays else 1.0
        if own is None or not own.is_far(part):
            return False
        single = max(self.measured.batch_sizes) == 1
        return felt is None or (felt.is_far(part) if single else felt.exceeds(part / 2))

    def contradicts_initial(self, layer: NormLayer) -> bool:
        """Tell whether what a never-estimated layer received has another mean or variance.

        The size of the effect is enough: that the statistics were never estimated is known.
        """
        seen = self.distance(layer, "batch")
        return seen is not None and seen.exceeds(1)

    @staticmethod
    def is_trained(layer: NormLayer) -> bool:
        """Tell whether the affine parameters show training: a bias that is not one constant.

        Weights are often drawn at random or set to zero at the start, biases hardly ever.
        """
        bias = layer.bias
        if bias is None or bias.is_meta or layer.is_lazy:
            return False
        return bool((bias != bias.flatten()[0]).any()) or (bias.numel() == 1 and bool(bias != 0))

    def can_estimate(self, layer: NormLayer) -> bool:
        """Tell whether `recalibrate` on the batches given would estimate the layer's statistics."""
        if self.runs is None:
            return False
        return layer.path in self.runs.after or (layer.hold is not None and bool(self.calls(layer)))

    def noise(self, layer: NormLayer) -> float | None:
        """Predict the noise of the layer's batch statistics at the batch size given."""
        return batch_noise(self.samples(layer, "batch"), layer.eps)


def gather(
    model: nn.Module,
    batches: object,
    *,
    forward: Forward | None,
    score: Score | None,
    max_batches: int | None,
) -> Evidence:
    """Run what the rules need, and leave the model as it was.

    Raises:
        BatchError: There is no batch, or the model cannot be called on one.
    """
    if batches is None:
        return Evidence(model, None)
    with preserved(model):  # iterating a DataLoader draws from the global generators
        taken = tuple(islice(each_batch(batches), max_batches))
        if not taken:
            raise BatchError("there is no batch in batches=", help="give at least one batch")
        runs = _run(model, taken, forward, score)
        if isinstance(batches, DataLoader):
            runs = replace(runs, loader=batches, total=_length(batches))
    return Evidence(model, runs)


def _run(
    model: nn.Module, batches: tuple[object, ...], forward: Forward | None, score: Score | None
) -> Runs:
    """Trace the flows one after the other."""
    sizes = tuple(batch_size(batch) for batch in batches)

    def run(flow: Literal["eval", "batch"]) -> tuple[Trace, float | None]:
        scores: list[float] = []

        def keep_score(output: object, batch: object) -> None:
            if score is not None:
                scores.append(float(score(output, batch)))

        seen = trace(model, iter(batches), forward=forward, flow=flow, on_output=keep_score)
        return seen, _weighted(scores, sizes) if scores else None

    called: dict[nn.Module, None] = {}
    noted = register_module_forward_pre_hook(lambda module, _: called.setdefault(module, None))
    try:
        in_eval, eval_score = run("eval")
    finally:
        noted.remove()
    by_batch, batch_score = run("batch")
    traces: dict[Flow, Trace] = {"eval": in_eval, "batch": by_batch}
    after: dict[str, tuple[Tensor, Tensor]] = {}
    recalibrated_score = None
    if _can_recalibrate(model, in_eval):
        # Inputs that give no statistics (NaN, say) leave two numbers to report, not three.
        with suppress(CalibrationError):
            report = recalibrate(model, iter(batches), forward=forward)
            after = {done.path: (done.mean_after, done.var_after) for done in report.layers}
            traces["recalibrated"], recalibrated_score = run("eval")
    head = None
    if eval_score is not None and batch_score is not None:
        head = Head(eval_score, batch_score, recalibrated_score)
    inside = set(model.modules())
    order = tuple(module for module in called if module in inside)
    return Runs(batches, sizes, traces, head, order, after, forward)


def _length(loader: DataLoader[object]) -> int | None:
    """Return how many batches a DataLoader has; over an iterable dataset it may not know."""
    try:
        return len(loader)
    except TypeError:
        return None


def _weighted(values: list[float], weights: tuple[int, ...]) -> float:
    """Average per batch, each batch weighing as many samples as it has."""
    return sum(v * w for v, w in zip(values, weights, strict=True)) / max(sum(weights), 1)


def _can_recalibrate(model: nn.Module, seen: Trace) -> bool:
    modes = probe_modes(model)
    return any(
        layer.has_statistics and layer.path in seen.reached and modes.held_by(layer) is None
        for layer in find_norms(model)
    )
