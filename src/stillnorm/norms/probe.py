"""Which mode `model.train()` and `model.eval()` would leave each module in, found by looking only.

Most models follow `nn.Module.train`, and the answer is known. Where a class overrides `train()`
(mmdetection's `norm_eval`, "freeze flags"), the override itself is asked: it is called both ways,
and everything it can reach is put back.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from stillnorm.norms.find import find_norms
from stillnorm.norms.hold import hold_of
from stillnorm.norms.layer import NormLayer
from stillnorm.norms.tensors import keep_tensors


@dataclass(frozen=True, eq=False)
class Modes:
    """The flag `training` of every module, after `model.train()` and after `model.eval()`.

    Args:
        in_train: By module: the flag after `model.train()`.
        in_eval: By module: the flag after `model.eval()`.
    """

    in_train: dict[nn.Module, bool]
    in_eval: dict[nn.Module, bool]

    def held_by(self, layer: NormLayer) -> str | None:
        """Name what keeps the layer normalising by its running statistics through `model.train()`.

        Returns:
            ``"stillnorm"``, another library's layer (``"torchvision FrozenBatchNorm2d"``), the
            override that does it (``"MyNet.train()"``), or None when nothing does.
        """
        if layer.hold is not None:
            return "stillnorm"
        if layer.family == "frozen":
            return f"{layer.provider} {layer.kind}"
        if self.in_train[layer.module] or layer.normalizes_by(training=False) != "running":
            return None
        owners = [layer.module, *reversed(layer.ancestors)]
        owner = next((m for m in owners if overrides_train(m)), layer.module)
        return f"{type(owner).__name__}.train()"


def probe_modes(model: nn.Module) -> Modes:
    """Find what `model.train()` and `model.eval()` would do, leaving the model as it is.

    Cost:
        Nothing for a model without `train()` overrides; otherwise one call of each, and a copy of
        the tensors that the overriding modules own themselves.
    """
    modules = list(model.modules())
    if not any(overrides_train(module) for module in modules):
        held = {module: hold_of(module) is not None for module in modules}
        return Modes(
            in_train={module: not held[module] for module in modules},
            in_eval=dict.fromkeys(modules, False),
        )
    with _put_back(model), contextlib.redirect_stdout(io.StringIO()):
        model.train()
        in_train = {module: module.training for module in modules}
        model.eval()
        in_eval = {module: module.training for module in modules}
    return Modes(in_train, in_eval)


def overrides_train(module: nn.Module) -> bool:
    """Tell whether calling `train()` on the module may do more than set flags."""
    if "train" in module.__dict__:
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if hold_of(module) is not None:
        return getattr(type(module), "held_base").train is not nn.Module.train  # noqa: B009
    return type(module).train is not nn.Module.train


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Put back what `train()` overrides can change: attributes, flags, tensors they own.

    Overrides below which there is no norm layer (LoRA layers that merge their weights, say) cannot
    matter to a norm layer and are not called at all: an instance attribute shadows them meanwhile.
    """
    relevant = {id(m) for norm in find_norms(model) for m in (norm.module, *norm.ancestors)}
    modules = list(model.modules())
    attributes = {module: _shallow(module) for module in modules}
    grads = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    holds = [(hold, hold.asked) for m in modules if (hold := hold_of(m)) is not None]
    owned = [
        tensor
        for module in modules
        if overrides_train(module) and id(module) in relevant
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    for module in modules:
        if overrides_train(module) and id(module) not in relevant:
            module.__dict__["train"] = lambda mode=True, module=module: module
    try:
        with keep_tensors(owned):
            yield
    finally:
        for module, saved in attributes.items():
            _restore(module, saved)
        for parameter, required, grad in grads:
            parameter.requires_grad_(required)
            parameter.grad = grad
        for hold, asked in holds:
            hold.asked = asked


_Saved = dict[str, tuple[object, object]]


def _shallow(module: nn.Module) -> _Saved:
    """Note the module's attributes, and the items of those that are containers."""
    return {
        name: (value, value.copy() if isinstance(value, dict | list | set) else None)
        for name, value in module.__dict__.items()
    }


def _restore(module: nn.Module, saved: _Saved) -> None:
    """Put the attributes back: the same objects, containers with the same items."""
    now = module.__dict__
    for name in [name for name in now if name not in saved]:
        del now[name]
    for name, (value, items) in saved.items():
        now[name] = value
        if isinstance(value, list) and isinstance(items, list):
            value[:] = items
        elif isinstance(value, dict | set) and isinstance(items, dict | set):
            value.clear()
            value.update(items)
