"""Which mode `model.train()` and `model.eval()` would leave each module in, found by looking only.

Most models follow `nn.Module.train`, and the answer is known. Where a class overrides `train()`
(mmdetection's `norm_eval`, "freeze flags"), the override itself is asked: it is called both ways,
and everything it can reach is put back.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from stillnorm.norms.find import find_norms
from stillnorm.norms.hold import hold_of
from stillnorm.norms.layer import NormLayer
from stillnorm.norms.paths import every_module
from stillnorm.norms.undo import random_kept, writes_undone


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
        if layer.family == "keras":
            return None if layer.normalizes_by(training=True) == "batch" else "trainable=False"
        if self.in_train[layer.module] or layer.normalizes_by(training=False) != "running":
            return None
        owners = [layer.module, *reversed(layer.ancestors), *reversed(layer.elsewhere)]
        owner = next((m for m in owners if overrides_train(m)), layer.module)
        return f"{type(owner).__name__}.train()"


def probe_modes(model: nn.Module) -> Modes:
    """Find what `model.train()` and `model.eval()` would do, leaving the model as it is.

    Cost:
        Nothing for a model without `train()` overrides; otherwise one call of each, and a copy of
        what the overrides write.
    """
    modules = every_module(model)
    if not any(overrides_train(m) for m in modules) and type(model).eval is nn.Module.eval:
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


# DistributedDataParallel's calls Module's and nothing else.
_PLAIN_TRAINS = (nn.Module.train, DistributedDataParallel.train)


def overrides_train(module: nn.Module) -> bool:
    """Tell whether calling `train()` on the module may do more than set flags."""
    if "train" in module.__dict__:
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return False
    if hold_of(module) is not None:
        return getattr(type(module), "held_base").train not in _PLAIN_TRAINS  # noqa: B009
    return type(module).train not in _PLAIN_TRAINS


@contextlib.contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Put back what `train()` overrides can change: attributes, flags, tensors, random states.

    Overrides below which there is no norm layer (LoRA layers that merge their weights, say) cannot
    matter to a norm layer and are not called at all: an instance attribute shadows them meanwhile.
    """
    modules: dict[nn.Module, dict[str, object]] = {}
    containers: dict[int, tuple[_Container, _Container]] = {}
    _note(model, modules, containers)
    tensors = [
        tensor
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    grads = [(p, p.requires_grad, p.grad) for p in tensors if isinstance(p, nn.Parameter)]
    every = dict.fromkeys((*modules, *model.modules()))  # TorchScript's own are in no __dict__
    flags = [(module, module.training) for module in every if hasattr(module, "training")]
    holds = [(hold, hold.asked) for m in modules if (hold := hold_of(m)) is not None]
    for module in modules:
        if overrides_train(module) and not find_norms(module):
            module.__dict__["train"] = lambda mode=True, module=module: module
    try:
        with writes_undone(tensors), random_kept():
            yield
    finally:
        for module, attributes in modules.items():
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for container, items in containers.values():
            _restore(container, items)
        for module, training in flags:
            if module.training != training:  # TorchScript keeps it elsewhere
                module.training = training
        for parameter, required, grad in grads:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
            if parameter.grad is not grad:
                parameter.grad = grad
        for hold, asked in holds:
            hold.asked = asked


_Container = dict[object, object] | list[object] | set[object]


def _note(
    value: object,
    modules: dict[nn.Module, dict[str, object]],
    containers: dict[int, tuple[_Container, _Container]],
) -> None:
    """Note a module's attributes or a container's items, and everything in them.

    Modules in plain lists and dicts count too: a `train()` may set modes that `modules()` misses.
    """
    inside: Iterable[object] = ()
    if isinstance(value, nn.Module):
        if value not in modules:
            modules[value] = dict(value.__dict__)
            inside = value.__dict__.values()
    elif isinstance(value, dict | list | set):
        if id(value) not in containers:
            containers[id(value)] = value, value.copy()
            inside = value.values() if isinstance(value, dict) else value
    elif isinstance(value, tuple):
        inside = value
    for item in list(inside):
        _note(item, modules, containers)


def _restore(container: _Container, items: _Container) -> None:
    """Put the same items back into the same container, in the same order."""
    container.clear()
    if isinstance(container, list):
        container.extend(items)
    else:
        container.update(items)  # type: ignore[arg-type]
