"""What the rules read: the model's layers and modes and, with batches, what its forwards showed."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from stillnorm.diagnosis.causes import Causes
from stillnorm.diagnosis.evidence.prediction import Prediction, run_prediction
from stillnorm.diagnosis.evidence.request import Request
from stillnorm.diagnosis.evidence.runs import Flow, Runs
from stillnorm.diagnosis.evidence.structure import Structure
from stillnorm.diagnosis.measures.measure import (
    Distance,
    Samples,
    batch_noise,
    distance,
    samples_of,
)
from stillnorm.diagnosis.training_step.step import Step, run_step
from stillnorm.norms import Modes, NormLayer, find_norms, probe_modes
from stillnorm.tracing import Call, Site

SENSITIVE = 1 / 3  # of the thresholds, once the user's own score says that statistics are stale


class CannotTell(Exception):
    """Raised by a rule that cannot be decided here; the message is the reason in the report."""


class Evidence:
    """Everything that rules look at. Numbers per layer are computed when first asked for.

    They are of the `statistics` as they were found, by path, whatever becomes of the model.

    Args:
        request: What `check` was given. Rules that call its functions leave the model as it was.
        runs: What the model's forwards showed; None without batches.
    """

    def __init__(self, request: Request, runs: Runs | None) -> None:
        self.request = request
        self.model = model = request.model
        self.layers: tuple[NormLayer, ...] = find_norms(model)
        self.modes: Modes = probe_modes(model)
        self.statistics = {layer.path: _copied(layer) for layer in self.layers}
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

    @cached_property
    def prediction(self) -> Prediction:
        """What `predict` did on the first batch, for rules that need it."""
        return run_prediction(self.request, self.measured.batches[0], self.layers)

    @cached_property
    def step(self) -> Step:
        """What one training step did, on the first batch, for rules that need it."""
        return run_step(self.request, self.measured.batches[0], self.layers)

    @cached_property
    def structure(self) -> Structure:
        """How data flow between the layers, for rules that need it."""
        runs = self.measured
        return Structure(self.model, runs.batches[0], runs.forward, self.modes.in_train)

    def must_know(self, setting: Literal["eps", "momentum"]) -> None:
        """Raise where the layers are read from a file that does not say this setting of them."""
        norms = () if self.request.file is None else self.request.file.norms
        if any(setting == "momentum" or math.isnan(norm.eps) for norm in norms):
            raise CannotTell(f"{setting} is not in the file")

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
        if layer.family == "keras":  # to which the flag means nothing
            return False
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

    def sites(self, where: Collection[str], paths: Collection[str]) -> tuple[Site, ...]:
        """Return the source lines that `where` wrote, as far as the calls at the paths tell."""
        traces = () if self.runs is None else self.runs.traces.values()
        known = {str(x.site): x.site for seen in traces for x in seen.strays if x.site}
        known |= {
            str(call.site): call.site
            for (path, _), calls in self._calls.items()
            for call in calls
            if call.site and path in paths
        }
        return tuple(known[line] for line in where if line in known)

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
        """Return what the layer received in one flow, a row per sample; None of masked input."""
        key = (layer.path, flow)
        if key not in self._samples:
            sizes = self.runs.batch_sizes if self.runs is not None else ()
            calls = self.calls(layer, flow)
            masked = any(call.masked for call in calls)
            self._samples[key] = None if masked else samples_of(calls, sizes)
        return self._samples[key]

    def distance(self, layer: NormLayer, flow: Flow) -> Distance | None:
        """Measure how far the layer's running statistics are from what it received in a flow.

        In the recalibrated flow they are the recalibrated ones.
        """
        key = (layer.path, flow)
        if key not in self._distances:
            mean, var = self.statistics[layer.path]
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

    @cached_property
    def is_harmless(self) -> bool:
        """Tell whether statistics that are off cost nothing: the user's score does not suffer.

        Not where the first norm is off. There the data are others, and a network that has not
        learned them can score by chance whatever the statistics are.
        """
        head = None if self.runs is None else self.runs.head
        first = next(iter(self.in_order(self.layers)), None)
        return (
            head is not None and head.is_harmless and (first is None or not self.mismatched(first))
        )

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
        if bias is None or bias.is_meta or layer.is_lazy or not bias.numel():
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


def _copied(layer: NormLayer) -> tuple[Tensor | None, Tensor | None]:
    """Copy the running mean and variance; None for what a layer lacks, or does not have yet."""
    if layer.is_lazy:
        return None, None
    mean, var = layer.running_mean, layer.running_var
    return (
        None if mean is None else mean.detach().clone(),
        None if var is None else var.detach().clone(),
    )
