"""Whether two models of two frameworks compute the same, and learn the same statistics."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from stillnorm.errors import PortError
from stillnorm.norms.adapters.keras import complement
from stillnorm.porting.copied import Copy
from stillnorm.porting.example import (
    as_input,
    each,
    is_channels_last,
    moved,
    must_be_numbers,
    must_not_be_constant,
    taken,
)
from stillnorm.porting.keras.parts import KerasPart, as_torch
from stillnorm.porting.keras.running import (
    dropout_rates,
    left_as_found,
    precision_of,
    random_layer,
    run,
)
from stillnorm.porting.matching import Pair
from stillnorm.porting.report import Agreement, StatisticsError
from stillnorm.porting.rounding import FLOAT32, UNMEASURED, allowed, precision
from stillnorm.porting.step import (
    Moments,
    counted,
    expected,
    forward_in_training,
    learns,
    magnitude,
    moments,
    relative,
    start_from_zero,
)
from stillnorm.porting.torch_layers import TorchPart
from stillnorm.state import attributes_kept, eval_mode, preserved
from stillnorm.tracing import call_example, eager, tensors_in


def agreement(
    keras_model: Any,
    model: nn.Module,
    pairs: Sequence[Pair],
    example: object,
    torch_example: object,
    tolerance: float | None,
) -> Agreement:
    """Run both models on one example, in eval mode and one forward in train mode.

    Both are left as they were. See `stillnorm.porting.compare` for the arguments.
    """
    last = any(is_channels_last(part) for part, _ in pairs)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if like.is_meta:
        raise PortError("the torch model is on the meta device", help="give it values first")

    def given() -> Any:
        if torch_example is not None:
            return each(torch_example, lambda value: as_torch(value).to(like.device))
        return each(example, lambda value: as_input(moved(as_torch(value), last), like))

    norms = [pair for pair in pairs if pair[1].norm is not None]
    kept = [pair for pair in norms if "running_mean" in pair[1].tensors()]
    learning = [pair for pair in kept if learns(*pair)]
    rates = dropout_rates(keras_model)
    with (
        left_as_found(keras_model),
        attributes_kept(model),
        preserved(model),
        torch.no_grad(),
        eager(),
    ):
        with taken("Keras", "example= is what the Keras model takes: an array, or several"):
            theirs = run(keras_model, example, training=False)
        must_be_numbers(example)
        help = "torch_example= is the input as torch takes it"
        with eval_mode(model), taken("torch", help), _called_dropouts(model) as dropouts:
            ours = call_example(model, given())
        there, here = _flat(theirs, ours)
        apart = _outputs(there, here, last)
        must_not_be_constant(example, there)
        exact = None
        if tolerance is None:
            exact = Copy.of(model, given(), [twin.path for _, twin in learning])
        eps = precision([*model.parameters(), *model.buffers()])
        bounds = _Bounds(tolerance, exact, max(eps, precision_of(keras_model)), eps)
        worst, numbers = _worst(apart, bounds.of_outputs(here, theirs))
        rows: list[StatisticsError] = []
        reason = f"{layer}, is random in train mode" if (layer := random_layer(keras_model)) else ""
        if kept and not reason:
            for one, twin in learning:
                start_from_zero(twin, one)
            before = {pair: (moments(pair[0].read), moments(_read(pair[1]))) for pair in kept}
            with counted(kept) as counts:
                reason = forward_in_training(model, given())
            if not reason:
                run(keras_model, example, training=True)
                in_order = list(counts)
                kept.sort(key=lambda pair: _place(in_order, pair[1].module))
                rows = [_row(pair, *before[pair], counts[pair[1].module], bounds) for pair in kept]
    settings = [(twin.path, what) for one, twin in norms for what in _settings(one, twin)]
    agreed = Agreement(
        *numbers,
        (*settings, *_rates(rates, dropouts)),
        tuple(rows),
        reason,
        given=tolerance is not None,
        output=worst if len(apart) > 1 else None,
    )
    return agreed if agreed.same_outputs else replace(agreed, unequal=_unequal(pairs))


_FEW = 8  # numbers in an output


@dataclass(frozen=True)
class _Bounds:
    """How far two models may be apart.

    Args:
        tolerance: As given; None to go by the torch model's rounding.
        exact: What a copy of it computes; None where it was not asked for, or cannot.
        eps: The precision of the coarser model.
        eps_torch: That of the torch model.
    """

    tolerance: float | None
    exact: Copy | None
    eps: float
    eps_torch: float

    def of_outputs(
        self, ours: Sequence[Tensor], theirs: object
    ) -> list[tuple[float, float | None]]:
        """Return per output what is allowed, and its own rounding where that was measured."""
        if self.tolerance is not None or self.exact is None:
            return [(UNMEASURED if self.tolerance is None else self.tolerance, None)] * len(ours)
        # Rounding is of finite numbers: where an input overflows, the copy may not.
        finite = [y.isfinite() for y in ours]
        exact, ours = (
            [y.where(at, 0) for y, at in zip(outputs, finite, strict=True)]
            for outputs in (_flat(theirs, self.exact.output)[1], ours)
        )
        apart = _outputs(exact, ours, last=False)
        most = max((largest for _, largest in apart), default=0.0)
        found: list[tuple[float, float | None]] = []
        for y, (error, largest) in zip(ours, apart, strict=True):
            own = error / (largest or 1.0)
            # One number may happen to be exact; of eight, one is off as far as rounding goes.
            explained = own * max(1.0, _FEW / max(y.numel(), 1))
            # Beside others an output may be rounding and no more: what should be 0.
            beside = most / (largest or most or 1.0)
            found.append((allowed(explained, self.eps, self.eps_torch, beside), own))
        return found

    def of_statistics(self, path: str, ours: Moments) -> tuple[float, float]:
        """Return what rounding explains in a norm, and what is allowed."""
        if self.tolerance is not None:
            return min(self.tolerance, UNMEASURED), self.tolerance
        if self.exact is None or path not in self.exact.statistics:
            return UNMEASURED, UNMEASURED
        own = max(relative(ours, self.exact.statistics[path]))
        explained = allowed(own, self.eps, self.eps_torch)
        return explained, max(explained, UNMEASURED)


def _settings(one: KerasPart, twin: TorchPart) -> Iterator[str]:
    """Yield what a norm is set to on one side and not on the other."""
    norm, layer = twin.norm, one.layer
    if norm is None:
        return
    if not norm.has_statistics:
        yield "has no running statistics in torch"
        return
    held = norm.hold is not None or norm.family == "frozen"
    theirs: dict[str, float] = {"eps": layer.epsilon, "frozen": not one.updates}
    ours: dict[str, float | None] = {"eps": norm.eps, "frozen": held}
    if not held:
        theirs["momentum"], ours["momentum"] = complement(layer.momentum), norm.momentum
    if not held and one.updates:
        for name in ("weight", "bias"):
            stored, tensor = one.stored.get(name), twin.tensors().get(name)
            if stored is not None and tensor is not None:
                theirs[f"requires_grad of {name}"] = stored.variable.trainable
                ours[f"requires_grad of {name}"] = tensor.requires_grad
    for name, value in ours.items():
        if value is None or not math.isclose(value, theirs[name], rel_tol=1e-9, abs_tol=1e-15):
            yield f"{name} is {value} in torch, {theirs[name]} in Keras"


def _rates(theirs: Sequence[float], ours: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield the dropouts that drop another share, where both sides have as many."""
    if len(theirs) != len(ours) or sorted(theirs) == sorted(ours.values()):
        return  # parallel branches come in any order
    for rate, (path, p) in zip(theirs, ours.items(), strict=True):
        if rate != p:
            yield path, f"drops {p} in torch, {rate} in Keras"


@contextmanager
def _called_dropouts(model: nn.Module) -> Iterator[dict[str, float]]:
    """Collect the rates of the dropouts that drop something, by path, in order of calls."""
    rates: dict[str, float] = {}
    handles = [
        module.register_forward_hook(lambda *_, path=path, p=module.p: rates.update({path: p}))
        for path, module in model.named_modules()
        if isinstance(module, _DropoutNd) and module.p
    ]
    try:
        yield rates
    finally:
        for handle in handles:
            handle.remove()


def _unequal(pairs: Sequence[Pair]) -> tuple[str, ...]:
    """Return the paths of layers that hold other values than their twins."""

    def same(one: KerasPart, twin: TorchPart) -> bool:
        for name, tensor in twin.tensors().items():
            there, here = one.read(name), tensor.detach().cpu()
            rtol = max(torch.finfo(here.dtype).eps, FLOAT32)
            if there is not None and not torch.allclose(
                there.double(), here.double(), rtol=rtol, atol=torch.finfo(here.dtype).tiny
            ):
                return False
        return True

    return tuple(twin.path for one, twin in pairs if not same(one, twin))


# ------------------------------------------------------------------------------- outputs and rows


def _flat(theirs: Any, ours: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs of both, in one order where they have names."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping) and theirs.keys() == ours.keys():
        ours = [ours[name] for name in theirs]
    return list(tensors_in(theirs)), list(tensors_in(ours))


def _outputs(theirs: list[Tensor], ours: list[Tensor], last: bool) -> list[tuple[float, float]]:
    """Return per output the largest difference, and the largest finite value."""
    if len(theirs) != len(ours):
        raise PortError(
            f"the Keras model gives {len(theirs)} outputs, the torch model {len(ours)}",
            help="models that compute the same give the same outputs, in the same order",
        )
    apart: list[tuple[float, float]] = []
    for a, b in zip(theirs, ours, strict=True):
        first = moved(a, last)
        a = first if first.shape == b.shape else a
        if a.shape != b.shape:
            raise PortError(
                f"an output is {tuple(a.shape)} in Keras and {tuple(b.shape)} in torch",
                help="the same network has outputs of the same shape, but for the channel axis",
            )
        a, b = a.double(), b.detach().cpu().double()
        off = (a - b).masked_fill(a == b, 0.0)  # infinity is itself, as masks have it
        apart.append((magnitude(off), magnitude(a[a.isfinite()])))
    return apart


def _worst(
    apart: Sequence[tuple[float, float]], bounds: Sequence[tuple[float, float | None]]
) -> tuple[int, tuple[float, float, float, float | None]]:
    """Return which output is worst off; its difference, largest value, bound and rounding."""
    rows = [(*one, *bound) for one, bound in zip(apart, bounds, strict=True)]
    share = [error / (bound * largest or sys.float_info.min) for error, largest, bound, _ in rows]
    worst = share.index(max(share))
    return worst, rows[worst]


def _row(
    pair: Pair, there: Moments, here: Moments, calls: list[int], bounds: _Bounds
) -> StatisticsError:
    """Compare what the statistics are now with what Keras made of its own."""
    one, twin = pair
    now = moments(_read(twin))
    n, right = expected(one, twin, there, here, calls)
    return StatisticsError(
        twin.path, one.name, n, *relative(now, right), *bounds.of_statistics(twin.path, now)
    )


def _read(twin: TorchPart) -> Callable[[str], Tensor | None]:
    return twin.tensors().get


def _place(order: list[nn.Module], module: nn.Module) -> int:
    """Return when a norm was called; the ones that were not come last."""
    return order.index(module) if module in order else len(order)
