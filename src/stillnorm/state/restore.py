"""Putting norm layers back to what was recorded: tensors, switches, holds; all or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from stillnorm.errors import StateError
from stillnorm.holding import hold, part_unheld, release, remember, why_not, why_not_release
from stillnorm.norms import NormLayer, find_norms, write
from stillnorm.norms.adapters import keras
from stillnorm.norms.hold import HOLD
from stillnorm.state.change import SwitchChange, TensorChange, changes
from stillnorm.state.diff import Difference, diff_layers
from stillnorm.state.record import AFFINE, Recorded, record, shown, tensors_of

_SETTINGS = ("momentum", "eps", "track_running_stats")
_REQUIRES_GRAD = tuple(f"{name}.requires_grad" for name in AFFINE)


def restore(recorded: tuple[Recorded, ...], model: nn.Module) -> Difference:
    """Put the layers back; return what differed."""
    norms = find_norms(model)
    standing = {path: norm for norm in norms for path in norm.paths}
    pairs = [(before, norm) for before in recorded for norm in _standing(before, standing)]
    for before, norm in pairs:
        if (reason := _why_not(before, norm)) is not None:
            raise StateError(
                f"{shown(norm.path)} cannot be restored: {reason}", help="nothing was changed"
            )
    difference = diff_layers(recorded, [record(norm) for norm in norms])
    put_back: list[Callable[[], None]] = []
    try:
        for before, norm in pairs:
            put_back.append(remember(norm.module))
            for tensor, value in _moved(before, norm):
                put_back.append(partial(write, tensor, tensor.detach().clone()))
                write(tensor, value)
            _put(before, norm)
        part_unheld(model, put_back)
        for before, norm in pairs:
            _must_match(before, norm)
    except BaseException:
        for undo in reversed(put_back):
            undo()
        raise
    return difference


def _standing(before: Recorded, standing: dict[str, NormLayer]) -> list[NormLayer]:
    """Return the layer, or the layers if it was registered twice and has become two."""
    found = {id(norm): norm for path in before.paths if (norm := standing.get(path)) is not None}
    if not found:
        raise StateError(
            f"{shown(before.path)} cannot be restored: the model has no norm layer there",
            help="nothing was changed; restore the model that the snapshot was taken of",
        )
    return list(found.values())


def _why_not(before: Recorded, norm: NormLayer) -> str | None:
    """Return the reason why the layer cannot be what was recorded, or None when it can."""
    now = record(norm)
    is_keras = norm.family == "keras"
    for change in changes(before, now, norm.path):
        if isinstance(change, TensorChange) and not (change.of or change.is_cast):
            return str(change)  # gone, new, or of another shape
        if isinstance(change, SwitchChange) and norm.is_scripted and change.switch in _SETTINGS:
            return f"TorchScript does not let go of {change}"
    owned = {id(t) for t in (*norm.module.parameters(False), *norm.module.buffers(False))}
    for name, tensor in norm.tensors().items():
        if id(tensor) not in owned and now.tensors and not is_keras:
            return f"{name} is computed from other tensors (parametrized)"
    if before.hold is not None and now.switches["held"] != before.switches["held"]:
        if norm.family == "frozen":
            return f"it was held and is a {norm.kind} of {norm.provider} now"
        return why_not(norm, before.hold.affine)
    if before.hold is None and norm.hold is not None:
        return why_not_release(norm)
    return None


def _moved(before: Recorded, norm: NormLayer) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the tensors whose bits differ, each with the value recorded."""
    tensors = tensors_of(norm)
    for change in changes(before, record(norm), norm.path):
        if isinstance(change, TensorChange) and not change.is_cast:
            yield (
                tensors[change.tensor],
                _like(before.tensors[change.tensor], tensors[change.tensor]),
            )


def _like(value: Tensor, tensor: Any) -> Tensor:
    """Distribute the value as the tensor is distributed, if it is."""
    if not hasattr(tensor, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, tensor.device_mesh, tensor.placements)


def _put(before: Recorded, norm: NormLayer) -> None:
    """Put hold and switches back; a held layer's first, since holding sets some of the others."""
    module: Any = norm.module
    if before.hold is not None:
        hold(module, before.hold.affine)
        module.__dict__[HOLD].asked = before.hold.asked
        module.__dict__[HOLD].required_grad = dict(before.hold.required_grad)
    elif norm.hold is not None:
        release(module)
    if norm.family == "keras":
        now = record(norm).switches
        for name in ("momentum", "eps", "trainable"):
            if now[name] != before.switches[name]:
                keras.set_switch(module, name, before.switches[name])
        for name in _REQUIRES_GRAD:  # after `trainable`, which sets them
            if (required := before.switches.get(name)) is not None:
                keras.set_switch(module, name, required)
        module.training = bool(before.switches["training"])
        return
    now = record(norm).switches
    for name in _SETTINGS:
        if now[name] != before.switches[name]:
            setattr(module, name, before.switches[name])
    if now["training"] != before.switches["training"]:
        module.training = bool(before.switches["training"])
    for name in _REQUIRES_GRAD:
        required = before.switches.get(name)
        if required is not None and required != now[name]:
            getattr(module, name.removesuffix(".requires_grad")).requires_grad_(required)


def _must_match(before: Recorded, norm: NormLayer) -> None:
    """Look again: two layers that share a tensor cannot both have what each had alone."""
    for change in changes(before, record(norm), norm.path):
        if isinstance(change, TensorChange) and change.is_cast:
            continue
        if isinstance(change, SwitchChange) and change.switch == "kind":
            continue
        raise StateError(
            f"{shown(norm.path)} cannot be restored: {change} remains",
            help="nothing was changed; it shares this with another layer, and did not before",
        )
