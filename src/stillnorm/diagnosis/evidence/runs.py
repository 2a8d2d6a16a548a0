"""What the model's forwards showed: three flows over the same batches, the user's score in each.

All are in eval mode but for the norms themselves:

- the **eval flow**, running statistics everywhere: what the user ships;
- the **batch flow**, batch statistics wherever `train()` would use them: what was trained, and
  what running statistics estimate;
- the **recalibrated** flow, the eval flow with the statistics that `recalibrate` would give, which
  the batch flow has shown: what that repairs.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.data import DataLoader

from stillnorm.calibration.traced import traced_statistics
from stillnorm.diagnosis.evidence.request import Request
from stillnorm.errors import BatchError
from stillnorm.norms import write
from stillnorm.state import preserved
from stillnorm.tracing import (
    Forward,
    Trace,
    batch_size,
    call,
    copied,
    each_batch,
    looking,
    strangers_kept,
    tensors_in,
    trace,
)

Flow = Literal["eval", "batch", "recalibrated"]

MOST_VALUES = 2**22  # of an output: 32 MiB
MATTERS = 0.05  # of a score that is no fraction: less is what other samples might have shown
LEAST = 0.01  # of a fraction: less is nobody's loss


@dataclass(frozen=True)
class Head:
    """The user's own score, higher is better, three ways.

    Args:
        eval: With running statistics: what ships.
        batch: With batch statistics: what was trained.
        recalibrated: With statistics re-estimated on the same batches; None where nothing could be.
        samples: How many samples they are of.
    """

    eval: float
    batch: float
    recalibrated: float | None
    samples: int

    def matters(self, difference: float) -> bool:
        r"""Tell a gain from what other samples might have shown.

        Of fractions that is two standard errors of a difference, but at least one point: a mean of
        n values between 0 and 1 that is p has a variance of at most p (1 - p) / n. Of any other
        score it is five percent.
        """
        scores = [s for s in (self.eval, self.batch, self.recalibrated) if s is not None]
        if not all(0 <= score <= 1 for score in scores):
            return difference > MATTERS * max(map(abs, scores))
        low, high = min(scores), max(scores)
        variance = (low * (1 - low) + high * (1 - high)) / max(self.samples, 1)
        return difference > max(LEAST, 2 * math.sqrt(variance))

    @property
    def is_harmless(self) -> bool:
        """Whether neither batch statistics nor recalibrated ones would score better than eval."""
        best = max(self.batch, self.eval if self.recalibrated is None else self.recalibrated)
        return not self.matters(best - self.eval)

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
        outputs: By flow: the output on the first batch, as `as_vector` gives it.
        head: The scores, or None without `score`.
        called: The modules in order of their first call in the eval flow.
        after: By path: running mean and variance after recalibration.
        forward: How the user calls the model.
        loader: The DataLoader they came from, or None.
    """

    batches: tuple[object, ...]
    batch_sizes: tuple[int, ...]
    traces: dict[Flow, Trace]
    outputs: dict[Flow, Tensor]
    head: Head | None
    called: tuple[nn.Module, ...]
    after: dict[str, tuple[Tensor, Tensor]]
    forward: Forward | None
    loader: DataLoader[object] | None

    @property
    def total(self) -> int | None:
        """How many batches the loader has; over an iterable dataset it may not know."""
        if self.loader is None:
            return None
        try:
            return len(self.loader)
        except TypeError:
            return None


def run_flows(request: Request, max_batches: int | None) -> Runs:
    """Run the flows one after the other, and leave the model as it was.

    Raises:
        BatchError: There is no batch, or the model cannot be called on one.
    """
    model, batches = request.model, request.batches
    forward, score = request.forward, request.score
    if max_batches is not None and max_batches < 1:
        raise BatchError(f"max_batches is {max_batches}", help="at least 1, or None for all")
    with preserved(model):  # iterating a DataLoader draws from the global generators
        with _generators_kept(batches):
            taken = tuple(islice(each_batch(batches), max_batches))
        if not taken:
            raise BatchError("there is no batch in batches=", help="give at least one batch")
        sizes = tuple(batch_size(batch) for batch in taken)

        outputs: dict[Flow, Tensor] = {}

        def run(flow: Literal["eval", "batch"], name: Flow) -> tuple[Trace, float | None]:
            scores: list[float] = []

            def keep_score(output: object, batch: object) -> None:
                if name not in outputs:
                    outputs[name] = as_vector(output)
                if score is not None:
                    scores.append(request.rate(output, batch))

            seen = trace(model, iter(taken), forward=forward, flow=flow, on_output=keep_score)
            return seen, _weighted(scores, sizes) if scores else None

        called: dict[nn.Module, None] = {}
        noted = register_module_forward_pre_hook(lambda module, _: called.setdefault(module, None))
        try:
            in_eval, eval_score = run("eval", "eval")
        finally:
            noted.remove()
        by_batch, batch_score = run("batch", "batch")
        traces: dict[Flow, Trace] = {"eval": in_eval, "batch": by_batch}
        after: dict[str, tuple[Tensor, Tensor]] = {}
        recalibrated_score = None
        if estimated := traced_statistics(model, by_batch):
            after = {layer.path: statistics for layer, statistics in estimated.items()}
            for layer, (mean, var) in estimated.items():
                tensors = layer.tensors()
                write(tensors["running_mean"], mean)
                write(tensors["running_var"], var)
            traces["recalibrated"], recalibrated_score = run("eval", "recalibrated")
    head = None
    if eval_score is not None and batch_score is not None:
        head = Head(eval_score, batch_score, recalibrated_score, sum(sizes))
    inside = set(model.modules())
    return Runs(
        batches=taken,
        batch_sizes=sizes,
        traces=traces,
        outputs=outputs,
        head=head,
        called=tuple(module for module in called if module in inside),
        after=after,
        forward=forward,
        loader=batches if isinstance(batches, DataLoader) else None,
    )


@contextlib.contextmanager
def _generators_kept(batches: object) -> Iterator[None]:
    """Keep a DataLoader's own generators: the next epoch is the one it would have been."""
    owners = (batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    kept = [(g, g.get_state()) for g in found if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in kept:
            generator.set_state(state)


def scored_in_eval(request: Request, runs: Runs) -> float:
    """Run the batches in eval mode and return the user's score, the model as it is now."""
    scores: list[float] = []
    with looking(request.model), strangers_kept(request.model):
        request.model.eval()
        for batch in runs.batches:
            output = call(request.model, copied(batch), request.forward)
            scores.append(request.rate(output, batch) if request.score else math.nan)
    return _weighted(scores, runs.batch_sizes)


def as_vector(output: object) -> Tensor:
    """Return all floating numbers of an output in one float64 vector, thinned evenly when many.

    Example:
        >>> as_vector({"logits": torch.ones(2, 3), "ids": torch.arange(2)}).shape
        torch.Size([6])
    """
    found = [t.flatten() for t in tensors_in(output) if _is_plain(t)]
    step = sum(map(len, found)) // MOST_VALUES + 1
    return torch.cat([t[::step].double() for t in found]) if found else torch.empty(0)


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is floating numbers in memory."""
    strided = tensor.layout is torch.strided and not tensor.is_nested and not tensor.is_meta
    return strided and tensor.is_floating_point() and tensor.numel() > 0


def _weighted(values: list[float], weights: tuple[int, ...]) -> float:
    """Average per batch, each batch weighing as many samples as it has."""
    return sum(v * w for v, w in zip(values, weights, strict=True)) / max(sum(weights), 1)
