"""One batch norm from Keras to torch and back: not its numbers alone, what it does with them.

Keras                            torch
gamma, beta                      weight, bias
moving_mean, moving_variance     running_mean, running_var
momentum                         1 - momentum
epsilon                          eps
axis = -1, or 1                  1, always
scale=False, center=False        a weight of 1, a bias of 0, which do not learn
trainable=False                  held, affine frozen
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from stillnorm.holding import hold, release, remember, why_not, why_not_release
from stillnorm.norms import NormLayer
from stillnorm.norms.adapters.keras import complement
from stillnorm.norms.hold import Affine, hold_of
from stillnorm.porting.keras.parts import KerasPart
from stillnorm.porting.part import Refusal
from stillnorm.repair.surgery import Surgery

_AFFINE = {"weight": ("gamma", 1.0), "bias": ("beta", 0.0)}
_STATISTICS = ("running_mean", "running_var")


def to_torch(one: KerasPart, norm: NormLayer, surgery: Surgery) -> Iterator[str]:
    """Make a torch batch norm what a Keras one is; yields what is worth saying.

    Raises:
        Refusal: It cannot be that.
    """
    _refuse(one, norm)
    layer, module = one.layer, norm.module
    frozen, held = not one.updates, hold_of(layer)
    affine: Affine = "trains" if held is not None and held.affine == "trains" else "frozen"
    if norm.family == "frozen" and layer.trainable:
        raise Refusal(f"{norm.kind} is always frozen, and in Keras the layer is trainable")
    if norm.hold is not None and not frozen:
        if reason := why_not_release(norm):
            raise Refusal(f"cannot be released: {reason}")
        surgery.note(remember(module))
        release(module)
        yield "no longer held"
    _set(surgery, module, "eps", layer.epsilon, norm.eps)
    if norm.family != "frozen":
        _set(surgery, module, "momentum", complement(layer.momentum), norm.momentum)
    tensors = norm.tensors()
    for name, (keras_name, neutral) in _AFFINE.items():
        value = one.read(name)
        if (tensor := tensors.get(name)) is None:
            if value is not None and bool((value != neutral).any()):
                raise Refusal(f"has no {name} in torch (affine=False), and {keras_name} in Keras")
            if value is not None and not frozen:
                yield f"no {name} in torch: {keras_name}, now {neutral:g}, does not learn there"
            continue
        surgery.write(tensor, torch.full_like(tensor, neutral) if value is None else value)
        if value is None:
            yield f"no {keras_name} in Keras: {name} is {neutral:g} and does not learn"
        if norm.hold is None and isinstance(tensor, nn.Parameter):
            kept = frozen and affine == "frozen"  # what a hold puts back
            learns = value is not None and (kept or one.stored[name].variable.trainable)
            _require_grad(surgery, tensor, learns)
    for name in _STATISTICS:
        value = one.read(name)
        if value is not None:
            surgery.write(tensors[name], value)
    if getattr(layer, "synchronized", False) and not isinstance(module, nn.SyncBatchNorm):
        yield "synchronized in Keras: SyncBatchNorm.convert_sync_batchnorm does that in torch"
    if frozen and norm.family != "frozen" and (norm.hold is None or norm.hold.affine != affine):
        there = "trainable=False" if held is None else "held"
        if reason := why_not(norm, affine):
            raise Refusal(f"cannot be held, as it is by {there} in Keras: {reason}")
        surgery.note(remember(module))
        hold(module, affine)
        yield f"{there} in Keras: held"


def to_keras(one: KerasPart, norm: NormLayer, surgery: Surgery) -> Iterator[str]:
    """Make a Keras batch norm what a torch one is; yields what is worth saying.

    Raises:
        Refusal: It cannot be that.
    """
    _refuse(one, norm)
    layer = one.layer
    held = norm.family == "frozen" or norm.hold is not None
    if norm.hold is not None and norm.hold.affine == "trains" and norm.trains_affine:
        raise Refusal("is held while its affine trains: trainable=False in Keras freezes both")
    if hold_of(layer) is not None and not held:
        raise Refusal("is held by sn.freeze in Keras, and not in torch: sn.unfreeze it there first")
    if norm.momentum is None and norm.family != "frozen":
        raise Refusal("averages over all batches (momentum=None), which Keras cannot")
    _set_keras(surgery, layer, "epsilon", norm.eps)
    if norm.momentum is not None:
        _set_keras(surgery, layer, "momentum", complement(norm.momentum))
    _train(surgery, layer, not held)
    tensors = norm.tensors()
    for name, (keras_name, neutral) in _AFFINE.items():
        tensor = tensors.get(name)
        if name not in one.stored:
            if tensor is not None and bool((tensor != neutral).any()):
                raise Refusal(f"has no {keras_name} in Keras, and a {name} in torch")
            if tensor is not None and tensor.requires_grad and not held:
                yield f"no {keras_name} in Keras: {name}, now {neutral:g}, does not learn there"
            continue
        value = torch.full(one.geometry.weight, neutral) if tensor is None else tensor
        write_keras(surgery, one, name, value)
        learns = tensor is not None and (held or tensor.requires_grad)
        if not learns and not held:
            _train(surgery, one.stored[name].variable, False)
            yield f"{name} does not learn in torch: {keras_name}.trainable is off"
    for name in _STATISTICS:
        write_keras(surgery, one, name, tensors[name])
    if isinstance(norm.module, nn.SyncBatchNorm) and not getattr(layer, "synchronized", False):
        yield "SyncBatchNorm in torch: in Keras that is synchronized=True, on TensorFlow alone"
    if held:
        yield "held in torch: trainable=False in Keras"


def write_keras(surgery: Surgery, one: KerasPart, name: str, value: Tensor) -> None:
    """Write a value into a Keras variable, to be taken back."""
    before = one.read(name)
    if before is not None:
        surgery.note(lambda: one.write(name, before))
        one.write(name, value.to(before.dtype))


def _refuse(one: KerasPart, norm: NormLayer) -> None:
    """Raise for what neither direction can do."""
    layer = one.layer
    if getattr(layer, "renorm", False):
        raise Refusal("renorm=True in Keras: torch has no batch renormalisation")
    rank = layer.input_spec.ndim
    if layer.axis % rank not in (1, rank - 1):
        raise Refusal(f"axis={layer.axis} of {rank} in Keras is no channel axis of a torch layer")
    if norm.family == "instance" or not norm.has_statistics:
        raise Refusal(f"the {norm.kind} in torch has no running statistics of the batch")
    if any(tensor.is_meta for tensor in norm.tensors().values()):
        raise Refusal("is on the meta device in torch")


def _set(surgery: Surgery, module: nn.Module, name: str, value: float, now: float | None) -> None:
    if value == now:
        return
    if name not in module.__dict__:
        raise Refusal(f"its {name} in torch is {now} and cannot be set; in Keras it is {value}")
    surgery.set_attribute(module, name, value)


def _set_keras(surgery: Surgery, layer: Any, name: str, value: float) -> None:
    before = getattr(layer, name)
    surgery.note(lambda: setattr(layer, name, before))
    setattr(layer, name, value)


def _train(surgery: Surgery, layer: Any, value: bool) -> None:
    """Set `trainable` of a layer or a variable; a layer hands it to its variables."""
    before = layer.trainable
    inside = [(variable, variable.trainable) for variable in getattr(layer, "variables", ())]

    def restore() -> None:
        layer.trainable = before
        for variable, trainable in inside:
            if variable.trainable != trainable:
                variable.trainable = trainable

    surgery.note(restore)
    layer.trainable = value


def _require_grad(surgery: Surgery, parameter: nn.Parameter, value: bool) -> None:
    before = parameter.requires_grad
    if before == value:
        return
    if parameter.is_inference() and not torch.is_inference_mode_enabled():
        raise Refusal("was made in inference mode, in torch: what learns there cannot be set")
    surgery.note(lambda: parameter.requires_grad_(before))
    parameter.requires_grad_(value)
