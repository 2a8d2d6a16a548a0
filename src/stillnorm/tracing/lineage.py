"""What the inputs of norms were computed from: data or weights alone, through which dropouts.

Tensors are followed by identity through the functions that are called on them, as in `links`; but
here every tensor is, and what is kept of it is a few facts.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from stillnorm.holding.deferred import METADATA
from stillnorm.norms import NormLayer
from stillnorm.tracing.batches import tensors_in
from stillnorm.tracing.kernels import kernel_of
from stillnorm.tracing.site import Site, calling_site
from stillnorm.tracing.visits import visits

_DROPOUT = ("input", "p", "training", "inplace")
_ATEN_DROPOUT = ("input", "p", "train")
_DROPOUTS: dict[object, tuple[str, ...]] = {
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _DROPOUT),
    **dict.fromkeys((F.alpha_dropout, F.feature_alpha_dropout), _DROPOUT),
    **dict.fromkeys((torch.dropout, torch.feature_dropout), _ATEN_DROPOUT),
}

# By name, without underscores: what normalises anew, so that no dropout before it is felt after;
# what leaves features on the last axis; what leaves every axis where it is.
_NORMALISING = frozenset({"layer_norm", "group_norm", "rms_norm", "normalize"})
_FEATURES_LAST = frozenset(
    {"linear", "embedding", "layer_norm", "lstm", "gru", "rnn_tanh", "rnn_relu"}
)
_ARITHMETIC = frozenset(
    {"add", "iadd", "radd", "sub", "isub", "rsub", "mul", "imul", "rmul", "div"}
)
_ACTIVATIONS = frozenset(
    {"relu", "gelu", "silu", "mish", "elu", "selu", "leaky_relu", "hardswish", "tanh", "sigmoid"}
)
_COPYING = frozenset({"dropout", "contiguous", "to", "float", "half", "clone"})
_ELEMENTWISE = _ARITHMETIC | _ACTIVATIONS | _COPYING


@dataclass(frozen=True)
class Dropout:
    """A dropout that acts in train mode only.

    Args:
        module: The module whose forward calls it: `nn.Dropout` itself, or what calls a function.
        site: The user's line.
        p: Its probability.
    """

    module: nn.Module | None
    site: Site | None
    p: float


@dataclass(frozen=True)
class Origin:
    """What is known of where a tensor comes from.

    Args:
        from_data: Whether anything but parameters, buffers and constants went into it.
        dropouts: The dropouts since the last norm.
        features_last: Whether it comes from a linear layer, an embedding or a recurrent layer with
            its axes untouched, so that its features are on the last one.
    """

    from_data: bool = False
    dropouts: frozenset[Dropout] = frozenset()
    features_last: bool = False


@dataclass(frozen=True)
class Received:
    """One input that was normalised.

    Args:
        layer: The norm layer; None for a call of none of the model's.
        site: The user's line.
        shape: The input's shape.
        origin: Where it comes from.
    """

    layer: NormLayer | None
    site: Site | None
    shape: tuple[int, ...]
    origin: Origin


class Lineage(TorchFunctionMode):
    """Follows what norms receive while a model runs in eval mode, with its dropouts on.

    Args:
        model: The model.
        norms: Its norm layers.
        in_train: The flag `training` of its modules in train mode: dropouts that it leaves off
            stay off.
    """

    def __init__(
        self, model: nn.Module, norms: Collection[NormLayer], in_train: Mapping[nn.Module, bool]
    ) -> None:
        super().__init__()
        self.received: list[Received] = []
        self._norms = {norm.module: norm for norm in norms}
        self._in_train = in_train
        self._own = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._running: list[nn.Module] = []
        self._origins: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow while the block runs."""
        with visits(self._enter, self._leave), self:
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._running and self._running[-1] is module:
            self._running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(*args, **kwargs)
        given = [(x, self._origin(x)) for x in tensors_in((args, kwargs))]
        name = str(getattr(func, "__name__", "")).strip("_")
        origin = Origin(
            any(known.from_data for _, known in given),
            frozenset().union(*(known.dropouts for _, known in given)),
        )
        if (kernel := kernel_of(func, args, kwargs)) is not None:
            x = kernel.input
            layer = next((self._norms[m] for m in self._running[::-1] if m in self._norms), None)
            self.received.append(Received(layer, calling_site(), tuple(x.shape), self._origin(x)))
            origin = replace(origin, dropouts=frozenset())
        elif name in _NORMALISING:
            origin = replace(origin, dropouts=frozenset())
        elif (dropout := self._dropout(func, args, kwargs)) is not None:
            func, args, kwargs, seen = dropout
            origin = replace(origin, dropouts=origin.dropouts | {seen})
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # what we ask is none of the model's
            self._note(args[0] if name == "setitem" else result, name, origin, given)
        return result

    def _dropout(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Dropout] | None:
        """Return the call of a dropout turned on, and what is known of it."""
        names = _DROPOUTS.get(func)
        if names is None:
            return None
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        p, owner = float(arguments.get("p", 0.5)), self._running[-1] if self._running else None
        acts = 0 < p < 1 and (owner is None or self._in_train.get(owner, True))
        default = func not in (F.alpha_dropout, F.feature_alpha_dropout)
        if not acts or arguments.get(names[2], default):
            return None
        seen = Dropout(owner, calling_site(), p)
        return func, (), {**arguments, names[2]: True}, seen

    def _origin(self, x: Tensor) -> Origin:
        reference, origin = self._origins.get(id(x), (None, None))
        if origin is not None and reference is not None and reference() is x:
            return origin
        return Origin(from_data=id(x) not in self._own)

    def _note(
        self, result: Any, name: str, origin: Origin, given: list[tuple[Tensor, Origin]]
    ) -> None:
        for tensor in tensors_in(result):
            last = tensor.dim() >= 3 and (
                name in _FEATURES_LAST
                or (
                    name in _ELEMENTWISE
                    and any(known.features_last and x.shape == tensor.shape for x, known in given)
                )
            )
            known = replace(origin, features_last=last)
            self._origins[id(tensor)] = weakref.ref(tensor), known
