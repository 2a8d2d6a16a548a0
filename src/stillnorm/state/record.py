"""The recorded state of one norm layer: copies of its tensors, its switches, its hold."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from stillnorm.errors import StateError
from stillnorm.norms import Hold, NormLayer
from stillnorm.norms.adapters import keras

Switch = None | bool | float | str

AFFINE = ("weight", "bias")
TENSORS = (*AFFINE, "running_mean", "running_var", "num_batches_tracked", *keras.RENORM)


@dataclass(frozen=True, eq=False)
class Recorded:
    """One norm layer as it was.

    Args:
        paths: Every path of the layer.
        tensors: Copies, on the CPU, of weight, bias, running_mean, running_var and
            num_batches_tracked: of those that existed. None of a lazy layer's. Of a layer of Keras
            with ``renorm=True`` moving_stddev, renorm_mean and renorm_stddev, too.
        switches: ``kind``, ``training``, ``momentum``, ``eps``, ``track_running_stats``,
            ``weight.requires_grad`` and ``bias.requires_grad`` where these exist, and ``held``
            (None, "affine frozen" or "affine trains"). Of a layer of Keras ``trainable``, too.
        hold: A copy of stillnorm's hold, or None.
    """

    paths: tuple[str, ...]
    tensors: dict[str, Tensor]
    switches: dict[str, Switch] = field(default_factory=dict)
    hold: Hold | None = None

    @property
    def path(self) -> str:
        """The first path."""
        return self.paths[0]


def record(layer: NormLayer) -> Recorded:
    """Record a layer.

    Raises:
        StateError: A tensor is on the meta device: there is no value to record.
    """
    tensors = tensors_of(layer)
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise StateError(
                f"{dotted(layer.path, name)} is on the meta device: it has no value",
                help="model.to_empty(device=...) and load a checkpoint first",
            )
    hold = layer.hold
    trainable = {"trainable": keras.trains(layer.module)} if layer.family == "keras" else {}
    requires_grad = {
        f"{name}.requires_grad": tensors[name].requires_grad for name in AFFINE if name in tensors
    }
    return Recorded(
        paths=layer.paths,
        tensors={name: _copy(tensor) for name, tensor in tensors.items()},
        switches={
            "kind": layer.kind,
            "training": bool(getattr(layer.module, "training", False)),
            "momentum": layer.momentum,
            "eps": layer.eps,
            "track_running_stats": layer.tracks,
            **trainable,
            **requires_grad,
            "held": None if hold is None else f"affine {hold.affine}",
        },
        hold=None if hold is None else replace(hold, required_grad=dict(hold.required_grad)),
    )


def tensors_of(layer: NormLayer) -> dict[str, Tensor]:
    """Return the tensors of a layer that are recorded, by name."""
    if layer.is_lazy:
        return {}
    besides = keras.renorm_statistics(layer.module) if layer.family == "keras" else {}
    return layer.tensors() | besides


def dotted(path: str, name: str) -> str:
    """Return the `state_dict` key of a layer's tensor.

    Example:
        >>> dotted("layer1.bn", "weight"), dotted("", "weight")
        ('layer1.bn.weight', 'weight')
    """
    return f"{path}.{name}" if path else name


def shown(path: str) -> str:
    """Return a path as reports write it; a model that is itself a norm layer has none.

    Keys of foreign files may hold anything: control characters do not reach the terminal.
    """
    return (path if path.isprintable() else ascii(path)) or "(root)"


def _copy(tensor: Tensor) -> Tensor:
    """Copy a tensor's bits to the CPU; of a distributed tensor the whole."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().to("cpu", copy=True).contiguous()
