"""The class of a convolution whose norm is computed in it: a subclass of the convolution's own.

    FoldingConv2d
      Folding     leaves its F.conv2d call to the held norm after it
      Conv2d

The object, its parameters, hooks and keys stay the same, as with a held layer. The class's own
forward is called, whatever it does; only the call that convolves is deferred.
"""

from __future__ import annotations

from functools import cache
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from stillnorm.convolutions import convolution_of
from stillnorm.holding.algebra import needs_plain_ops
from stillnorm.holding.deferred import defer
from stillnorm.holding.hooks import sees_output
from stillnorm.holding.naming import base_of, mangled
from stillnorm.norms.pair import PAIR, Pair

_PREFIX = "Folding"


class Folding(nn.Module):
    """A convolution that leaves its work to the held norm after it, where that is at hand."""

    folding_base: type[nn.Module]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Called by type(layer)(...) only: that makes a new layer, which belongs to no pair.
        self.__class__ = self.folding_base  # type: ignore[assignment]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A class whose own __getstate__ picks attributes loses the pair, and convolves at once.
        self.__dict__.setdefault("__module__", self.folding_base.__module__)

    def extra_repr(self) -> str:
        """Say that its norm is computed in it."""
        shown = super().extra_repr()
        return shown if PAIR not in self.__dict__ else f"{shown}, folds=(norm)"


class _Deferring(TorchFunctionMode):
    """Defers the calls that convolve."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = convolution_of(func, args, kwargs)
        return func(*args, **kwargs) if call is None else defer(call, self.pair)


def _forward(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call the forward of the layer's own class, its convolution deferred where nobody looks."""
    own = _folding_of(type(layer)).folding_base.forward
    pair = layer.__dict__.get(PAIR)
    if needs_plain_ops() or pair is None or sees_output(layer):
        return own(layer, *args, **kwargs)
    with _Deferring(pair):
        return own(layer, *args, **kwargs)


# --------------------------------------------------------------- forwards that TorchScript compiles


def _of_one_argument(self: Any, input: Tensor) -> Tensor:
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        y: Tensor = self._own_forward(input)
        return y
    else:  # noqa: RET505, TorchScript leaves out an else and nothing less
        return cast(Tensor, _forward(self, input))


def _of_convolution(self: Any, input: Tensor) -> Tensor:
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        y: Tensor = self._own_forward(input)
        return y
    else:  # noqa: RET505
        return _convolve(self, input)


def _convolve(layer: Any, x: Tensor) -> Tensor:
    """Do what `_forward` does, for torch's own forward with zero padding: its one call is known.

    It saves the function mode, which costs as much as the rest.
    """
    pair = layer.__dict__.get(PAIR)
    if pair is not None and layer.padding_mode == "zeros":
        settings = (layer.stride, layer.padding, layer.dilation, layer.groups)
        function = _OF_RANK[len(layer.kernel_size)]
        if not (needs_plain_ops() or sees_output(layer)):
            call = convolution_of(function, (x, layer.weight, layer.bias, *settings), {})
            if call is not None:
                return defer(call, pair)
        y: Tensor = function(x, layer.weight, layer.bias, *settings)
        return y
    return cast(Tensor, _forward(layer, x))


_OF_RANK: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _of_transposed(self: Any, input: Tensor, output_size: list[int] | None = None) -> Tensor:
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        y: Tensor = self._own_forward(input, output_size)
        return y
    else:  # noqa: RET505
        return cast(Tensor, _forward(self, input, output_size))


_TORCH_FORWARDS: dict[Any, Any] = {
    nn.Linear.forward: _of_one_argument,
    nn.Conv1d.forward: _of_convolution,
    nn.Conv2d.forward: _of_convolution,
    nn.Conv3d.forward: _of_convolution,
    nn.ConvTranspose1d.forward: _of_transposed,
    nn.ConvTranspose2d.forward: _of_transposed,
    nn.ConvTranspose3d.forward: _of_transposed,
}


def _forward_of(base: Any) -> Any:
    """Return the forward of a folding class; a `_conv_forward` of the class's own is called."""
    made = _TORCH_FORWARDS.get(base.forward, _forward)
    if made is _of_convolution and base._conv_forward not in _CONV_FORWARDS:
        return _of_one_argument
    return made


_CONV_FORWARDS = (nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward)

# --------------------------------------------------------------------- making and finding classes


@cache
def folding_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a folding convolution whose class is `base`; always the same one."""
    attributes = {
        "__module__": __name__,
        "__qualname__": mangled(_PREFIX, base),
        "__doc__": f"A {base.__name__} whose norm is computed in it by stillnorm.",
        "folding_base": base,
        "forward": _forward_of(base),
        "_own_forward": _renamed(base.forward, "_own_forward"),
    }
    made = type(f"{_PREFIX}{base.__name__}", (Folding, base), attributes)
    return cast(type[nn.Module], made)


def _renamed(function: Any, name: str) -> Any:
    """Copy a function under another name, by which TorchScript tells methods apart."""
    made = FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__, made.__annotations__ = function.__kwdefaults__, function.__annotations__
    return made


def __getattr__(name: str) -> type[nn.Module]:
    """Find a folding class by the name that `folding_class` gave it."""
    if (base := base_of(_PREFIX, name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return folding_class(base)


def _folding_of(kind: type) -> Any:
    """Return the folding class among the bases of a class."""
    return next(c for c in kind.__mro__ if "folding_base" in vars(c))


# ------------------------------------------------------------------ giving and taking a convolution


def is_convolutional(module: nn.Module) -> bool:
    """Tell whether a module is a convolution or a linear layer, of any subclass."""
    return isinstance(module, _ConvNd | nn.Linear)


def is_folding(module: nn.Module) -> bool:
    """Tell whether the class of the module is, or was made from, a folding class."""
    return isinstance(module, Folding)


def pair_up(module: nn.Module, pair: Pair) -> None:
    """Make a convolution leave its work to the held norms of the pair.

    Mutates:
        The class.
    """
    if not is_folding(module):
        kind = type(module)
        base = _under_wrappers(kind)
        module.__class__ = _rebased(kind, base, folding_class(base))  # type: ignore[arg-type]
        # torch.fx takes a module for a leaf when its __module__ is torch.nn's.
        module.__dict__.setdefault("__module__", base.__module__)
    module.__dict__[PAIR] = pair


def part(module: nn.Module) -> None:
    """Make a folding convolution what it was.

    Mutates:
        The class.
    """
    module.__dict__.pop(PAIR, None)
    kind = type(module)
    folding = _folding_of(kind)
    module.__class__ = _rebased(kind, folding, folding.folding_base)
    if module.__dict__.get("__module__") == folding.folding_base.__module__:
        del module.__dict__["__module__"]


def _under_wrappers(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class below those that torch makes for one module (parametrizations)."""
    while kind.__name__.startswith("Parametrized") and "__getstate__" in vars(kind):
        kind = kind.__bases__[0]
    return kind


def _rebased(kind: type, old: type, new: type) -> type[nn.Module]:
    """Return `kind` with another class in the place of `old`.

    Classes made for one module (by parametrizations, `fully_shard`) are made again over the new
    base, as if the base had been changed first: torch undoes them by returning to their base.
    """
    if kind is old:
        return new
    made_from = vars(kind).get("rebased_from")
    if (
        made_from is not None
        and new in made_from.__mro__
        and vars(kind).keys() == (vars(made_from).keys() | {"rebased_from"})
    ):
        return cast(type[nn.Module], made_from)
    bases = tuple(
        _rebased(base, old, new) if issubclass(base, old) else base for base in kind.__bases__
    )
    name = kind.__name__.replace(old.__name__, new.__name__)
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    own["rebased_from"] = kind
    return cast(type[nn.Module], type(kind)(name, bases, own))
