"""Holding one layer, releasing it, and the reasons why that cannot be done."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from stillnorm.holding import keras
from stillnorm.holding.folding import is_folding, part
from stillnorm.holding.held import held_class
from stillnorm.norms import Hold, NormLayer, find_norms, hold_of
from stillnorm.norms.adapters.keras import is_keras
from stillnorm.norms.hold import HOLD, Affine
from stillnorm.norms.pair import pair_of

_AFFINE = ("weight", "bias")


def why_not(layer: NormLayer, affine: Affine) -> str | None:
    """Return the reason why the layer cannot be held so, or None when it can."""
    module = layer.module
    if layer.family == "frozen":
        return f"weight and bias of {layer.provider}'s {layer.kind} are buffers and cannot train"
    if layer.is_scripted:
        return "a TorchScript module has no class to hold on to: freeze first, script afterwards"
    if layer.is_lazy:
        return "lazy: it has no statistics before its first forward"
    if layer.family == "keras":
        return keras.why_not(module, affine)
    if not layer.has_statistics:
        return "it has no running statistics (track_running_stats=False)"
    if layer.family == "instance" and not layer.tracks:
        return "it normalises by the sample: track_running_stats is off"
    if parametrize.is_parametrized(module):
        return "parametrized: remove_parametrizations() needs the class that register made"
    if "forward" in vars(module):
        return "its forward was replaced on the instance, past its class: freeze first"
    if affine == "frozen" and any(map(_is_computed, (layer.weight, layer.bias))):
        return (
            "its weight or bias is computed from other parameters (pruning, weight_norm), which "
            "would train on: make it a parameter first"
        )
    if affine == "frozen" and layer.trains_affine and (ddp := _reducer_above(layer)):
        return (
            f"inside {ddp}, which already waits for the gradients of weight and bias: "
            "freeze first, then wrap"
        )
    return _why_not_learning_again(layer) if affine == "trains" else None


def _is_computed(tensor: Tensor | None) -> bool:
    learns = tensor is not None and tensor.requires_grad
    return learns and not isinstance(tensor, nn.Parameter)


def _why_not_learning_again(layer: NormLayer) -> str | None:
    """Return the reason why the frozen affine of a held layer cannot train again, if any."""
    held = layer.hold
    would = held is not None and held.affine == "frozen" and any(held.required_grad.values())
    if would and (ddp := _reducer_above(layer)):
        return (
            f"inside {ddp}, which was made while weight and bias were frozen and does not "
            "synchronise their gradients: unwrap first, then wrap again"
        )
    return None


def _reducer_above(layer: NormLayer) -> str | None:
    """Name the DistributedDataParallel that expects a gradient for every parameter, if any."""
    for module in layer.above:
        if isinstance(module, DistributedDataParallel) and not module.find_unused_parameters:
            return type(module).__name__
    return None


def hold(module: nn.Module, affine: Affine) -> None:
    """Hold a layer, or change what of a held layer's affine is frozen.

    Mutates:
        The class, `training`, and with ``affine="frozen"`` `requires_grad` and `.grad` of weight
        and bias. No tensor's value.
    """
    if is_keras(module):
        keras.hold(module, affine)
        return
    held = hold_of(module)
    if held is None:
        base = type(module)
        held = Hold("trains", module.training, {}, module.__dict__.get("__module__"))
        module.__class__ = held_class(base)  # type: ignore[arg-type]
        module.__dict__[HOLD] = held
        # torch.fx takes a module for a leaf when its __module__ is torch.nn's.
        module.__dict__["__module__"] = base.__module__
        module.training = False
    if affine == "frozen" and held.affine == "trains":
        for name, parameter in _affine(module):
            held.required_grad[name] = parameter.requires_grad
            parameter.requires_grad_(False)
            parameter.grad = None
    elif affine == "trains" and held.affine == "frozen":
        _require_grad_as_before(module, held)
    held.affine = affine


def why_not_release(layer: NormLayer) -> str | None:
    """Return the reason why a held layer cannot be released, or None when it can."""
    kind = type(layer.module)
    base = getattr(kind, "held_base", None)
    made = keras.held_class if layer.family == "keras" else held_class
    if base is None or kind is not made(base):
        return (
            f"its class became {kind.__name__} after freeze: "
            "undo what changed it (parametrizations, fully_shard) first"
        )
    return _why_not_learning_again(layer)


def release(module: nn.Module) -> None:
    """Make a held layer what it would be now had it never been held.

    Mutates:
        The class, `training`, and `requires_grad` of weight and bias where it still is what the
        hold made it. No tensor's value.
    """
    if is_keras(module):
        keras.release(module)
        return
    held: Hold = module.__dict__[HOLD]
    _require_grad_as_before(module, held)
    asked = held.asked or module.training
    module.__class__ = getattr(type(module), "held_base")  # noqa: B009
    del module.__dict__[HOLD], module.__dict__["__module__"]
    if held.shadowed_module is not None:
        module.__dict__["__module__"] = held.shadowed_module
    module.training = asked


def remember(module: nn.Module) -> Callable[[], None]:
    """Return what puts the layer back to exactly what it is now, whatever `hold` did to it."""
    kind, attributes = module.__class__, dict(module.__dict__)
    held = attributes.get(HOLD)
    record = None if held is None else (dict(vars(held)), dict(held.required_grad))
    gradients = [(p, p.requires_grad, p.grad) for _, p in _affine(module)]
    variables = keras.remember(module) if is_keras(module) else None

    def put_back() -> None:
        module.__class__ = kind
        module.__dict__.update(attributes)  # before others go: it is never without its own
        for name in module.__dict__.keys() - attributes.keys():
            del module.__dict__[name]
        if held is not None and record is not None:
            vars(held).update(record[0], required_grad=record[1])
        for parameter, required, grad in gradients:
            if parameter.requires_grad != required:
                parameter.requires_grad_(required)
            if parameter.grad is not grad:
                parameter.grad = grad
        if variables is not None:
            variables()

    return put_back


def _affine(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    # Not by getattr: to look at a parametrized weight can change it (spectral norm in train mode).
    registered = module._parameters
    return [
        (name, parameter)
        for name in _AFFINE
        if name in registered and isinstance(parameter := registered[name], nn.Parameter)
    ]


def _require_grad_as_before(module: nn.Module, held: Hold) -> None:
    for name, parameter in _affine(module):
        if held.required_grad.get(name) and not parameter.requires_grad:
            parameter.requires_grad_(True)
    held.required_grad.clear()


def part_unheld(model: nn.Module, put_back: list[Callable[[], None]]) -> None:
    """Make the convolutions plain again whose norms nothing holds any more.

    Mutates:
        Their class.
    """
    pairs = {id(norm.hold.pair) for norm in find_norms(model) if norm.hold is not None}
    for module in model.modules():
        if is_folding(module) and id(pair_of(module)) not in pairs:
            put_back.append(remember(module))
            part(module)
