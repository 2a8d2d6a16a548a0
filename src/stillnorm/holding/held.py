"""The class of a held layer: a subclass of the layer's own class, made for it and named after it.

A layer is held by giving it this class: the same object, parameters, buffers, hooks and keys.

    HeldBatchNorm2d                     torch's forward: the core's takes its place
      Guard       train() stays in eval
      Core        normalises by the running statistics
      BatchNorm2d

    HeldBatchNormAct2d                  a forward of its own: kept
      OwnForward  re-asserts eval, catches the layer's own F.batch_norm call
      BatchNormAct2d
      Core        what its super().forward() reaches
      BatchNorm2d

Classes made at run time are found again by name through this module's `__getattr__`, so that
pickle works and users' own `__getstate__` keeps its say.
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from stillnorm.holding.algebra import constant, needs_plain_ops, norm_by_constants
from stillnorm.holding.deferred import Deferred, normalized
from stillnorm.holding.hooks import sees_input
from stillnorm.holding.naming import base_of, mangled
from stillnorm.norms.hold import HOLD, Affine, Hold

_PREFIX = "Held"

# Forwards whose eval path is F.batch_norm or F.instance_norm by the running statistics alone.
_TORCH_FORWARDS = (_BatchNorm.forward, SyncBatchNorm.forward, _InstanceNorm.forward)


class Guard(nn.Module):
    """What makes a layer stay as it is: `train()` is heard, noted, and not followed."""

    is_held_class = True
    held_base: type[nn.Module]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Called by type(layer)(...) only: that makes a new layer, which nobody holds.
        self.__class__ = self.held_base  # type: ignore[assignment]

    def train(self, mode: bool = True) -> Any:
        """Note the wish and stay in eval; children and the class's own `train()` follow it."""
        super().train(mode)
        self.__dict__[HOLD].asked = self.training  # the class's own train() may not have followed
        self.training = False
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # A class whose own __getstate__ picks attributes loses the record, not the hold.
        affine: Affine = "trains" if _requires_grad(self.weight, self.bias) else "frozen"
        self.__dict__.setdefault(HOLD, Hold(affine, asked=False, required_grad={}))
        self.__dict__.setdefault("__module__", self.held_base.__module__)

    def extra_repr(self) -> str:
        """Say what is held."""
        held = "statistics, affine" if self.__dict__[HOLD].affine == "frozen" else "statistics"
        return f"{super().extra_repr()}, held=({held})"


class Core(_NormBase):
    """A forward that normalises by the running statistics, whatever the flags say."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (N, C, *) by the running statistics."""
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            # TorchScript has no subclass to hold on to: its train() thaws, and `is_frozen` says so.
            momentum = 0.1 if self.momentum is None else self.momentum
            return F.batch_norm(
                input,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                momentum,
                self.eps,
            )
        else:  # noqa: RET505, TorchScript leaves out an else and nothing less
            self._check_input_dim(input)  # type: ignore[no-untyped-call]
            return held_norm(self, input)


class InstanceCore(_InstanceNorm):
    """The same for instance norm: with running statistics it is a batch norm in eval mode."""

    def _apply_instance_norm(self, input: Tensor) -> Tensor:
        return held_norm(self, input)


class OwnForward(nn.Module):
    """Around a forward of the class's own: it stays in eval and its norm saves no activation."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class's own forward."""
        if self.training:  # written directly, past train(), as some trainers do
            self.__dict__[HOLD].asked = True
            self.training = False
        held: Hold = self.__dict__[HOLD]
        folds = held.pair is not None and not needs_plain_ops()
        if not folds and (held.affine == "trains" or not torch.is_grad_enabled()):
            return super().forward(*args, **kwargs)
        if needs_plain_ops() and not _requires_grad(self.weight, self.bias):
            return super().forward(*args, **kwargs)
        with _HeldNormCall(self):
            return super().forward(*args, **kwargs)


class _HeldNormCall(TorchFunctionMode):
    """Computes the layer's own `F.batch_norm` call in eval mode as a held layer does."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            call = dict(zip(_BATCH_NORM_ARGUMENTS, args, strict=False)) | kwargs
            if self._is_own(call):
                return self._compute(call)
        return func(*args, **kwargs)

    def _is_own(self, call: dict[str, Any]) -> bool:
        """Tell whether the call is the layer's own, in eval mode.

        The input is no tensor while torch.fx traces.
        """
        return (
            call.get("running_mean") is self.layer.running_mean
            and isinstance(call["input"], Tensor)
            and not call.get("training")
        )

    def _compute(self, call: dict[str, Any]) -> Tensor:
        """Normalise; what is the layer's own affine is constant where it is frozen.

        A scale computed on the way, from a gate with parameters of its own, learns.
        """
        layer: Any = self.layer
        weight, bias = call.get("weight"), call.get("bias")
        if layer.__dict__[HOLD].affine == "frozen":
            weight = constant(weight) if weight is layer.weight else weight
            bias = constant(bias) if bias is layer.bias else bias
        return normalize(
            layer,
            call["input"],
            call["running_mean"],
            call["running_var"],
            weight,
            bias,
            call.get("eps", 1e-5),
        )


def _requires_grad(*tensors: Any) -> bool:
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)


_BATCH_NORM_ARGUMENTS = (
    "input",
    "running_mean",
    "running_var",
    "weight",
    "bias",
    "training",
    "momentum",
    "eps",
)


def held_norm(layer: Any, x: Tensor) -> Tensor:
    """Normalise x by the layer's running statistics, affine constant or learning as held.

    Shape:
        - x: ``(N, C, *)``
    """
    if layer.training:  # written directly, past train(), as some trainers do
        layer.__dict__[HOLD].asked = True
        layer.training = False
    mean, var = layer.running_mean, layer.running_var
    if isinstance(layer, _InstanceNorm) and layer.weight is None:
        # torch's F.instance_norm then rounds them to the input's dtype.
        mean, var = mean.to(x.dtype), var.to(x.dtype)
    weight: Tensor | None = layer.weight
    bias: Tensor | None = layer.bias
    if layer.__dict__[HOLD].affine == "frozen":
        weight, bias = constant(weight), constant(bias)
    return normalize(layer, x, mean, var, weight, bias, layer.eps)


def normalize(
    layer: nn.Module,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Normalise x by constant statistics: in the convolution before it where it may, or alone.

    Args:
        layer: The held layer whose call it is.
        x: The input, or what stands for it.
        mean: The mean of each channel, a constant.
        var: The variance of each channel, a constant.
        weight: The scale of each channel, or None; it learns where it requires a gradient.
        bias: The shift of each channel, or None; the same.
        eps: Added to the variance.

    Shape:
        - x: ``(N, C, *)``; the others ``(C,)``.
    """
    if type(x) is Deferred:
        if may_fold(x, layer, mean, var, weight, bias):
            return normalized(x, weight, bias, mean, var, eps)
        x = x.output()
    if _requires_grad(weight, bias):
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
    return norm_by_constants(x, mean, var, weight, bias, eps)


def may_fold(
    x: Deferred,
    layer: nn.Module,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
) -> bool:
    """Tell whether the layer may compute the convolution that x stands for.

    It is the one that x waits for, no hook sees it, and `F.batch_norm` would accept shapes and
    dtypes.
    """
    if x.pair is not layer.__dict__[HOLD].pair or sees_input(layer):
        return False
    if not x.may_fold:
        return False
    dtype, channels = x.call.dtype, x.call.shape[1]
    params = mean.dtype
    if params != dtype and not (params == torch.float32 and dtype in _HALF):
        return False
    return (
        _is_vector(mean, params, channels)
        and _is_vector(var, params, channels)
        and (weight is None or _is_vector(weight, params, channels))
        and (bias is None or _is_vector(bias, params, channels))
    )


_HALF = (torch.float16, torch.bfloat16)


def _is_vector(tensor: Tensor, dtype: torch.dtype, channels: int) -> bool:
    plain = type(tensor) is Tensor or type(tensor) is nn.Parameter
    return plain and tensor.dtype == dtype and tensor.numel() == channels


# ---------------------------------------------------------------------- making and finding classes


@cache
def held_class(base: type[nn.Module]) -> type[nn.Module]:
    """Return the class of a held layer whose class is `base`; always the same one."""
    core = InstanceCore if issubclass(base, _InstanceNorm) else Core
    bases: tuple[type, ...]
    if base.forward in _TORCH_FORWARDS:
        bases = (Guard, core, base)
    else:
        # The core must come after the forwards of the class's own and before torch's: a subclass
        # of torch's class stands for that place in the method resolution order.
        root = next(c for c in base.__mro__ if c.__module__.startswith("torch.nn."))
        bases = (Guard, OwnForward, base, type(f"Held{root.__name__}Core", (core, root), {}))
    made = type(
        f"{_PREFIX}{base.__name__}",
        bases,
        {
            "__module__": __name__,
            "__qualname__": mangled(_PREFIX, base),
            "__doc__": f"A {base.__name__} held by stillnorm.",
            "held_base": base,
        },
    )
    return cast(type[nn.Module], made)


def __getattr__(name: str) -> type[nn.Module]:
    """Find a held class by the name that `held_class` gave it."""
    if (base := base_of(_PREFIX, name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return held_class(base)
