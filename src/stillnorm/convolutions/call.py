"""One call of a convolution or of a linear layer: its tensors, its geometry, and when it was made.

A call can be made later than it was asked for, and then gives what it would have given: its
tensors must not have changed since, and autograd and autocast are as they were.

Every convolution of a model that trains comes through here in every step, so what depends on shapes
alone is computed once per shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillnorm.convolutions.geometry import Geometry
from stillnorm.errors import StateError

_LINEAR = ("input", "weight", "bias")
_CONV = (*_LINEAR, "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_LINEAR, "stride", "padding", "output_padding", "groups", "dilation")

# function: argument names
_FUNCTIONS: dict[object, tuple[str, ...]] = {
    F.linear: _LINEAR,
    F.conv1d: _CONV,
    F.conv2d: _CONV,
    F.conv3d: _CONV,
    F.conv_transpose1d: _TRANSPOSED,
    F.conv_transpose2d: _TRANSPOSED,
    F.conv_transpose3d: _TRANSPOSED,
}
_POSITIONS = {F.conv2d: 2, F.conv_transpose2d: 2, F.conv3d: 3, F.conv_transpose3d: 3, F.linear: 0}
_PLAIN = (Tensor, nn.Parameter)


def is_convolution(function: object) -> bool:
    """Tell whether a function is one of those that convolve, or `F.linear`."""
    return function in _FUNCTIONS


def convolution_of(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Convolution | None:
    """Return the call if its function is one that convolves a batch in a plain way, else None.

    Not plain are unbatched inputs, empty ones, linear layers on more than (N, C), tensor subclasses
    (distributed, quantised, fake), sparse layouts, inference mode, complex numbers, dtypes that do
    not match, and channels that do not fit, at which torch raises.
    """
    names = _FUNCTIONS.get(function)
    if names is None:
        return None
    if kwargs or len(args) != len(names):
        args = _positional(names, args, kwargs)
        if not args:
            return None
    x, weight, bias = args[:3]
    if type(x) not in _PLAIN or type(weight) not in _PLAIN:
        return None
    dtype = x.dtype
    cast = None
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:  # which it spares
        cast = torch.get_autocast_dtype(x.device.type)
    if (
        not dtype.is_floating_point
        or not _fits(weight, dtype, cast)
        or not (bias is None or (type(bias) in _PLAIN and _fits(bias, dtype, cast)))
        or x.layout is not torch.strided
        or torch.is_inference_mode_enabled()
        or x.is_inference()
    ):
        return None
    planned = _plan(
        function, x.shape, weight.shape, None if bias is None else bias.shape, _hashable(args[3:])
    )
    if planned is None:
        return None
    return Convolution(function, args, x, weight, bias, planned[0], planned[1], cast)


def _positional(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return all arguments in their order, with torch's defaults; nothing where torch raises."""
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    if not ({"input", "weight"} <= given.keys() <= set(names)) or len(args) > len(names):
        return ()
    defaults = {"bias": None, "padding": 0, "output_padding": 0}
    return tuple(given.get(name, defaults.get(name, 1)) for name in names)


def _fits(tensor: Tensor, dtype: torch.dtype, cast: torch.dtype | None) -> bool:
    if tensor.layout is not torch.strided or tensor.is_inference():
        return False
    if cast is None:
        return tensor.dtype == dtype
    return tensor.dtype.is_floating_point and tensor.dtype != torch.float64


def _hashable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(tuple(a) if isinstance(a, list) else a for a in arguments)


@lru_cache(maxsize=4096)
def _plan(
    function: Any,
    x: tuple[int, ...],
    weight: tuple[int, ...],
    bias: tuple[int, ...] | None,
    arguments: tuple[Any, ...],
) -> tuple[Geometry | None, tuple[int, ...]] | None:
    """Return the geometry and the output's shape for these shapes; None where they do not fit."""
    positions = _POSITIONS.get(function, 1)
    if len(x) != positions + 2 or len(weight) != positions + 2 or 0 in x:
        return None
    if not positions:
        shape: tuple[int, ...] = (x[0], weight[0])
        geometry, channels = None, weight[1]
    else:
        names = _FUNCTIONS[function][3:]
        given = dict(zip(names, arguments, strict=True))
        geometry = _geometry(given, positions, "output_padding" in names, weight[2:])
        if geometry is None:
            return None
        shape, channels = geometry.output_shape(x, weight), geometry.in_channels(weight)
    fits = channels == x[1] and min(shape) > 0 and (bias is None or bias == shape[1:2])
    return (geometry, shape) if fits else None


def _geometry(
    given: Mapping[str, Any], positions: int, transposed: bool, kernel: tuple[int, ...]
) -> Geometry | None:
    dilation = _each(given["dilation"], positions)
    padding = given["padding"]
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if any(t % 2 for t in total):
            return None  # torch pads one side more
        padding = [t // 2 for t in total]
    return Geometry(
        _each(given["stride"], positions),
        _each(padding, positions),
        dilation,
        transposed,
        _each(given.get("output_padding", 0), positions),
        int(given["groups"]),
    )


def _each(value: Any, positions: int) -> tuple[int, ...]:
    """Return one number per position."""
    if isinstance(value, int):
        return (value,) * positions
    numbers = tuple(int(v) for v in value)
    return numbers * positions if len(numbers) == 1 else numbers


class Convolution:
    """A call of a convolution, to be made now or later.

    Args:
        function: The function of `torch.nn.functional`.
        args: Its arguments.
        x: The input, (N, C_in, *).
        weight: The weight.
        bias: The bias, (C_out,), or None.
        geometry: The geometry; None for a linear layer.
        shape: The shape of the output.
        cast: What autocast casts to, or None.
    """

    # fmt: off
    __slots__ = (
        "args", "bias", "cast", "function", "geometry", "grad", "shape", "versions", "weight", "x",
    )
    # fmt: on

    def __init__(
        self,
        function: Callable[..., Tensor],
        args: tuple[Any, ...],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry | None,
        shape: tuple[int, ...],
        cast: torch.dtype | None,
    ) -> None:
        self.function, self.args = function, args
        self.x, self.weight, self.bias = x, weight, bias
        self.geometry, self.shape, self.cast = geometry, shape, cast
        self.grad = torch.is_grad_enabled()
        self.versions = x._version, weight._version, 0 if bias is None else bias._version

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the output."""
        return self.x.dtype if self.cast is None else self.cast

    @property
    def requires_grad(self) -> bool:
        """Whether the output belongs to a graph."""
        return self.grad and (
            self.x.requires_grad
            or self.weight.requires_grad
            or (self.bias is not None and self.bias.requires_grad)
        )

    @property
    def is_unchanged(self) -> bool:
        """Whether no tensor was written, or its memory freed, since the call was asked for."""
        bias = 0 if self.bias is None else self.bias._version
        written = self.versions != (self.x._version, self.weight._version, bias)
        return not written and bool(self.weight.untyped_storage().nbytes())

    def must_be_unchanged(self) -> None:
        """Raise when a tensor was written, or its memory freed, since the call was asked for."""
        if not self.is_unchanged:
            raise StateError(
                f"input or weight {tuple(self.weight.shape)} of a convolution was changed, or "
                "sharded again, before its output was used",
                help="the norm after it is computed in it: freeze that norm without fold_on=",
            )

    def __call__(self) -> Tensor:
        """Make the call as it was asked for.

        Raises:
            StateError: A tensor was written since.
        """
        self.must_be_unchanged()
        device = self.x.device.type
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(self.grad),
            torch.autocast(device, self.cast, enabled=self.cast is not None),
        ):
            return self.function(*self.args)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return input, weight and bias as the call uses them.

        The input is cast as autocast casts it; where the call was made without gradients, none
        flows to any of the three.

        Raises:
            StateError: A tensor was written since.
        """
        self.must_be_unchanged()
        x, weight, bias = self.x, self.weight, self.bias
        if not self.grad:
            x, weight, bias = x.detach(), weight.detach(), None if bias is None else bias.detach()
        return x if self.cast is None else x.to(self.cast), weight, bias
