"""What `predict` does: which norms it lets use the batch, what it moves, on what its answers rest.

It runs as the user wrote it, on the model as it was found: no mode is set here and no gradient
switched off. Afterwards everything is put back.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stillnorm.diagnosis.evidence.composition import samples_in, taken
from stillnorm.diagnosis.evidence.request import Request
from stillnorm.diagnosis.measures.answers import Comparison, compare
from stillnorm.errors import CallError
from stillnorm.norms import NormalizesBy, NormLayer, same_bits
from stillnorm.state import put_back
from stillnorm.tracing import copied, eager, first_line, strangers_kept, tensors_in
from stillnorm.tracing.kernels import kernel_of
from stillnorm.tracing.visits import visits


@dataclass(frozen=True, eq=False)
class Prediction:
    """What `predict` did on one batch.

    Args:
        by_batch: The layers that normalised by the batch, with the most samples in one call.
        moved: The layers whose running statistics changed: by how much the means did, in running
            deviations, root mean square over channels.
        gradients: Whether gradients were on when a norm was called.
        dropout: Whether dropout was active.
        mates: How the answers to the first half differ without the other half; None where that
            says nothing.
        unknown: Why it says nothing.
    """

    by_batch: dict[NormLayer, int]
    moved: dict[NormLayer, float]
    gradients: bool
    dropout: bool
    mates: Comparison | None
    unknown: str


def run_prediction(request: Request, batch: object, layers: Collection[NormLayer]) -> Prediction:
    """Run `predict` on a batch and on its first half alone.

    Raises:
        CallError: `predict` raised on the batch.

    Mutates:
        Nothing: what `predict` changes in the model is put back, also when it raises.

    Cost:
        Two calls of `predict`, and a third where the answers differ, which tells random ones. One
        copy of the model's tensors.
    """
    watch = _Watch(layers)
    with _put_back(request):
        before = {layer: _statistics(layer) for layer in layers}
        with watch.watching():
            whole = _ask(request, batch)
        moved = {
            layer: _shift(layer, then, now)
            for layer, then in before.items()
            if not all(map(same_bits, then, now := _statistics(layer)))
        }
    mates, unknown = _without_mates(request, batch, whole)
    return Prediction(watch.by_batch, moved, watch.gradients, watch.dropout, mates, unknown)


def _ask(request: Request, batch: object) -> object:
    """Call `predict` on a copy of the batch: models write to what they are given."""
    assert request.predict is not None  # noqa: S101 - rules that come here need it
    try:
        return request.predict(request.model, copied(batch))
    except Exception as error:
        raise CallError(
            f"predict raised {first_line(error)}",
            help=f"nothing was changed; the error above has the line{_pair(batch)}",
        ) from error


def _pair(batch: object) -> str:
    """Say what `predict` is given where that may not be what it takes."""
    if isinstance(batch, list | tuple) and len(batch) > 1:
        return "; predict= is given the whole batch: lambda model, batch: predict(model, batch[0])"
    return ""


@contextlib.contextmanager
def _put_back(request: Request) -> Iterator[None]:
    """Put everything back after the block, in which compiled code runs as written: hooks fire."""
    with put_back(request.model, *request.restore), strangers_kept(request.model), eager():
        yield


# ------------------------------------------------------------------------------- batch mates


def _without_mates(request: Request, batch: object, whole: object) -> tuple[Comparison | None, str]:
    """Compare the answers to the first half alone, or say why that cannot be done."""
    size = samples_in(batch)
    half = range(size // 2)
    if not half:
        return None, "the batch has one sample"
    part = taken(batch, half, size)

    def compared(*, reseeded: bool = False) -> Comparison:
        with _put_back(request):
            if reseeded:
                _reseed()
            return compare(whole, _ask(request, part), half, size)

    try:
        mates = compared()
    except CallError as error:
        return None, f"on half of the batch {error.fact}"
    except Exception as error:  # answers of a kind that cannot be subtracted
        return None, f"the answers cannot be compared ({type(error).__name__})"
    if not mates.parts:
        return None, "nothing in the answer belongs to one sample"
    if mates.changed and _differ(mates, compared(reseeded=True)):
        return None, "the answers are random"
    return mates, ""


def _differ(a: Comparison, b: Comparison) -> bool:
    """Tell whether asking twice gave two answers."""
    return any(
        bool(((x.off - y.off).abs() > x.noise).any())
        for x, y in zip(a.parts, b.parts, strict=False)
    )


def _reseed() -> None:
    """Give the global generators another state."""
    torch.manual_seed(torch.initial_seed() + 1)
    random.seed(random.random())
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(random.randrange(2**32))


# ------------------------------------------------------------------------------- statistics


def _statistics(layer: NormLayer) -> tuple[Tensor, ...]:
    """Copy mean and variance, where there are any with a value."""
    both = (layer.running_mean, layer.running_var)
    return tuple(x.detach().clone() for x in both if x is not None and not x.is_meta)


def _shift(layer: NormLayer, before: tuple[Tensor, ...], after: tuple[Tensor, ...]) -> float:
    """Return how far the mean moved, in deviations, root mean square over channels."""
    (mean, var), (moved, _) = ((x.double() for x in pair) for pair in (before, after))
    return float(((moved - mean) / (var + layer.eps).sqrt()).square().mean().sqrt())


# ------------------------------------------------------------------------------- the instrument


class _Watch(TorchFunctionMode):
    """Notes by what norms normalise while the user's code runs, and changes nothing in it.

    Args:
        layers: The layers to watch.
    """

    def __init__(self, layers: Collection[NormLayer]) -> None:
        super().__init__()
        self.by_batch: dict[NormLayer, int] = {}
        self.gradients = False
        self.dropout = False
        self._layers = {layer.module: layer for layer in layers}
        self._open: list[_Open] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note while the block runs."""
        with visits(self._enter, self._leave), self:
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        if (layer := self._layers.get(module)) is not None:
            self._open.append(_Open(layer))
            self.gradients |= torch.is_grad_enabled()

    def _leave(self, module: nn.Module, args: Any, *rest: Any) -> None:
        if not self._open or self._open[-1].layer.module is not module:
            return
        visit = self._open.pop()
        if not visit.normalized:  # a formula of the user's own: the flags have to do
            inputs = next(tensors_in(args), None)
            if inputs is not None:
                # Of a forward that raised torch passes no keyword arguments.
                training = visit.layer.called_in_training(rest[0] if len(rest) > 1 else {})
                self._note(visit.layer, visit.layer.normalizes_by(training), len(inputs))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if "dropout" in getattr(func, "__name__", ""):
            self.dropout |= bool(kwargs.get("training", args[2] if len(args) > 2 else False))
        kernel = kernel_of(func, args, kwargs) if self._open else None
        if kernel is not None:
            self._open[-1].normalized = True
            self._note(self._open[-1].layer, kernel.used, len(kernel.input))
        return func(*args, **kwargs)

    def _note(self, layer: NormLayer, used: NormalizesBy, samples: int) -> None:
        if used == "batch":
            self.by_batch[layer] = max(samples, self.by_batch.get(layer, 0))


@dataclass(eq=False)
class _Open:
    """A norm layer whose forward is running."""

    layer: NormLayer
    normalized: bool = False
