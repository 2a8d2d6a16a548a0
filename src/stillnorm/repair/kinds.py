"""What a norm can be replaced with: how each kind is made of a layer, or why it cannot be.

Nothing here changes the layer. A new module takes over parameters, buffers and hooks as the same
objects wherever it has the same.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from stillnorm.holding.held import held_class
from stillnorm.norms import NormLayer, hold_of, same_bits
from stillnorm.norms.hold import HOLD
from stillnorm.repair.affine import AffineNorm, scale_and_shift

Made = nn.Module | str  # the new module, or the reason why there is none

# What stood in a module's place before it, where the module itself cannot tell.
WAS = "_stillnorm_was"

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class Kind:
    """What layers can be replaced with.

    Args:
        make: Makes it of a layer.
        already: Tells whether a layer is one.
        same_eval: Whether it computes what the layer does in eval mode; that is then verified.
        same_train: Whether it does in train mode.
    """

    make: Callable[[NormLayer], Made]
    already: Callable[[NormLayer], bool] = lambda layer: False
    same_eval: bool = True
    same_train: bool = True


# ---------------------------------------------------------------------- classes


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a layer; of a held one, that from before."""
    kind = type(module)
    base: type[nn.Module] = getattr(kind, "held_base", kind)
    return base


def _root(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that says how the layer computes: torch's, or timm's with an activation."""
    return next(
        c
        for c in kind.__mro__
        if c.__module__.startswith("torch.nn.modules.") or _is_timm(c) or c is nn.Module
    )


def _is_timm(kind: type) -> bool:
    return kind.__module__.startswith("timm.") and kind.__name__ in (
        "BatchNormAct2d",
        "SyncBatchNormAct",
        "FrozenBatchNormAct2d",
    )


def _theirs(layer: NormLayer, name: str) -> Any:
    """Return another class of the layer's timm; None for a layer that is not timm's."""
    root = _root(class_of(layer.module))
    return getattr(sys.modules[root.__module__], name) if _is_timm(root) else None


def _own_methods(layer: NormLayer) -> str:
    """Say what the layer's class does by itself, which no other class would; "" for nothing."""
    kind = class_of(layer.module)
    known = _root(kind).__mro__
    harmless = {"__init__", "__repr__", "extra_repr", "_check_input_dim"}
    names = {
        name
        for c in kind.__mro__
        if c not in known
        for name, value in vars(c).items()
        if isinstance(value, FunctionType | property | classmethod | staticmethod)
    }
    own = ", ".join(f"{name}()" for name in sorted(names - harmless))
    return f"its class {kind.__name__} has a {own} of its own, which would be lost" if own else ""


def batch_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the BatchNorm class of a layer; None for a SyncBatchNorm, which knows no dimension."""
    kind = class_of(module)
    if not issubclass(kind, nn.SyncBatchNorm):
        return kind
    if (was := module.__dict__.get(WAS)) is not None:
        return class_of(was)
    root = _root(kind)
    return getattr(sys.modules[root.__module__], "BatchNormAct2d") if _is_timm(root) else None  # noqa: B009


# ---------------------------------------------------------------------- taking over


def _recast(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Return a module of another class that is otherwise the same: tensors, hooks, mode, hold."""
    hold = hold_of(module)
    new: nn.Module = object.__new__(kind if hold is None else held_class(kind))  # type: ignore[arg-type]
    own = {**module.__dict__}
    own.pop("_compiled_call_impl", None)  # it would call the old module
    own.pop(WAS, None)
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        own[name] = copy.copy(own[name])
    for name in STATE_HOOKS:
        own[name] = OrderedDict((key, _rebound(hook, new)) for key, hook in own[name].items())
    if hold is not None:
        own[HOLD] = dataclasses.replace(hold, required_grad=dict(hold.required_grad))
        own["__module__"] = kind.__module__
    new.__dict__.update(own)
    return new


def _rebound(hook: Any, module: nn.Module) -> Any:
    """Return a hook of torch's that is called with its module, for another module."""
    return type(hook)(hook.hook, module) if getattr(hook, "with_module", False) else hook


def _dressed(new: nn.Module, layer: NormLayer) -> nn.Module:
    """Give a new module the layer's activation, hooks and mode."""
    old, hold = layer.module, layer.hold
    for name in ("drop", "act"):
        if _is_timm(_root(class_of(old))) and name in old._modules:
            new._modules[name] = old._modules[name]
    for name in HOOKS:
        new.__dict__[name] = old.__dict__[name]
    new.training = old.training if hold is None else hold.asked
    return new


# ---------------------------------------------------------------------- the kinds


def _group(layer: NormLayer, groups: Callable[[NormLayer], int]) -> Made:
    if layer.family == "frozen":
        return 'its weight and bias are buffers, which cannot train: replace it with "batch" first'
    if layer.hold is not None:
        return "is held, and the new layer would keep no statistics to hold: sn.unfreeze it first"
    if own := _own_methods(layer):
        return own
    number = groups(layer)
    if (kind := _theirs(layer, "GroupNormAct")) is not None:
        new = kind(layer.num_features, number, layer.eps, affine=False, apply_act=False)
    else:
        new = nn.GroupNorm(number, layer.num_features, layer.eps, affine=False)
    new.affine = layer.weight is not None
    for name in ("weight", "bias"):
        new._parameters[name] = layer.module._parameters[name]
    return _dressed(new, layer)


def number_of_groups(layer: NormLayer) -> int:
    """Return the largest of 32, 16, 8, 4, 2 that leaves whole groups of enough channels, or 1.

    Two channels are enough on maps, where published networks have them (32 groups of 64 channels);
    BatchNorm1d may get rows, and two values normalised by themselves are +1 and -1: there, eight.
    """
    least = 8 if isinstance(layer.module, nn.BatchNorm1d) else 2
    channels = layer.num_features
    return next((g for g in (32, 16, 8, 4, 2) if channels % g == 0 and channels >= least * g), 1)


def _affine(layer: NormLayer) -> Made:
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        return "has no running statistics: it normalises by the batch in eval mode too"
    if layer.family == "batch" and (own := _own_methods(layer)):
        return own
    new = AffineNorm(*scale_and_shift(layer.weight, layer.bias, mean, var, layer.eps), layer.eps)
    for parameter, before in ((new.scale, layer.weight), (new.shift, layer.bias)):
        parameter.requires_grad_(before is not None and before.requires_grad)
    return _dressed(new, layer)


def _sync(layer: NormLayer) -> Made:
    if layer.family == "frozen":
        return 'is no batch norm: replace it with "batch" first'
    if own := _own_methods(layer):
        return own
    new = _recast(layer.module, _theirs(layer, "SyncBatchNormAct") or nn.SyncBatchNorm)
    new.__dict__.update({WAS: layer.module, "process_group": None})
    return new


def _frozen(layer: NormLayer) -> Made:
    if not layer.has_statistics:
        return "has no running statistics to freeze"
    if own := _own_methods(layer):
        return own
    if not issubclass(batch_class(layer.module) or nn.Module, nn.BatchNorm2d):
        return "is not known to be two-dimensional, as FrozenBatchNorm2d is"
    if (kind := _theirs(layer, "FrozenBatchNormAct2d")) is not None:
        new = kind(layer.num_features, eps=layer.eps, apply_act=False)
    elif (ops := sys.modules.get("torchvision.ops")) is not None:
        new = ops.FrozenBatchNorm2d(layer.num_features, layer.eps)
    else:
        return "FrozenBatchNorm2d is torchvision's: import torchvision first"
    mean = layer.tensors()["running_mean"]
    for name in new._buffers:
        value = layer.tensors().get(name, mean.new_full(mean.shape, float(name == "weight")))
        new._buffers[name] = value.detach().clone()  # an optimizer may still move the parameters
    new.__dict__[WAS] = layer.module
    return _dressed(new, layer)


def _batch(layer: NormLayer, asked: type[nn.Module] | None) -> Made:
    if layer.family == "frozen":
        return _from_frozen(layer, asked)
    if not isinstance(layer.module, nn.SyncBatchNorm):
        return f"is a {layer.kind}, not a SyncBatchNorm"
    if own := _own_methods(layer):
        return own
    known = batch_class(layer.module)
    if known is not None and asked is not None and not issubclass(known, asked):
        return f"was a {known.__name__}"
    if (kind := known or asked) is None:
        return 'does not know its dimension: say "batch1d", "batch2d" or "batch3d"'
    new = _recast(layer.module, kind)
    del new.__dict__["process_group"]
    return new


def _from_frozen(layer: NormLayer, asked: type[nn.Module] | None) -> Made:
    """Make a batch norm with the tensors of another library's frozen layer."""
    was = layer.module.__dict__.get(WAS)
    if asked not in (None, nn.BatchNorm2d):
        return f"a {layer.kind} is two-dimensional"
    if was is not None:
        new = _recast(was, batch_class(was) or nn.BatchNorm2d)
        new.__dict__.pop("process_group", None)
    elif (kind := _theirs(layer, "BatchNormAct2d")) is not None:
        new = kind(layer.num_features, layer.eps, apply_act=False)
    else:
        new = nn.BatchNorm2d(layer.num_features, layer.eps)
    for name, value in layer.tensors().items():
        _set_tensor(new, name, value)
    count, mean = new._buffers["num_batches_tracked"], layer.tensors()["running_mean"]
    new._buffers["num_batches_tracked"] = None if count is None else count.to(mean.device)
    new.__dict__.update(eps=layer.eps, affine=new._parameters["weight"] is not None)
    if (hold := hold_of(new)) is None:
        return _dressed(new, layer)
    hold.asked = layer.module.training
    return new


def _set_tensor(new: nn.Module, name: str, value: torch.Tensor) -> None:
    """Give a module a copy of the value; what has it already keeps its own object."""
    before = getattr(new, name)
    if before is not None and same_bits(before, value):
        return
    if name not in ("weight", "bias"):
        new._buffers[name] = value.detach().clone()
    elif before is not None or bool((value != (name == "weight")).any()):
        learns = before is None or before.requires_grad
        new._parameters[name] = nn.Parameter(value.detach().clone(), requires_grad=learns)


def _is_batch(layer: NormLayer, kind: type[nn.Module]) -> bool:
    return isinstance(layer.module, kind) and not isinstance(layer.module, nn.SyncBatchNorm)


KINDS: dict[str, Kind] = {
    "group": Kind(partial(_group, groups=number_of_groups), same_eval=False, same_train=False),
    "layer": Kind(partial(_group, groups=lambda layer: 1), same_eval=False, same_train=False),
    "affine": Kind(_affine, same_train=False),
    "sync": Kind(_sync, lambda layer: isinstance(layer.module, nn.SyncBatchNorm)),
    "frozen": Kind(_frozen, lambda layer: layer.family == "frozen", same_train=False),
} | {
    name: Kind(partial(_batch, asked=asked), partial(_is_batch, kind=asked or _BatchNorm))
    for name, asked in {
        "batch": None,
        "batch1d": nn.BatchNorm1d,
        "batch2d": nn.BatchNorm2d,
        "batch3d": nn.BatchNorm3d,
    }.items()
}
