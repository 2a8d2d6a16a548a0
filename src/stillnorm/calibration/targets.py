"""Which layers a recalibration is about, and why others are left alone."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from stillnorm.norms import Layers, NormLayer, find_norms, probe_modes, select
from stillnorm.norms.adapters.keras import renorm_statistics


@dataclass(frozen=True, eq=False)
class Targets:
    """The selected layers, sorted.

    Args:
        chosen: To be recalibrated.
        held: Held by something, and not selected by name.
        refused: (path, reason) of those that cannot be recalibrated.
    """

    chosen: tuple[NormLayer, ...]
    held: tuple[NormLayer, ...]
    refused: tuple[tuple[str, str], ...]


def find_targets(model: nn.Module, layers: Layers) -> Targets:
    """Sort the layers that `layers` selects; of held ones, all, unless it is None."""
    twins = _sharing_statistics(model)
    modes = probe_modes(model)
    chosen, held, refused = [], [], []
    for layer in select(model, layers):
        if reason := _refusal(layer) or twins.get(layer.module):
            refused.append((layer.path, reason))
        elif layers is None and modes.held_by(layer) is not None:
            held.append(layer)
        else:
            chosen.append(layer)
    return Targets(tuple(chosen), tuple(held), tuple(refused))


def _refusal(layer: NormLayer) -> str | None:
    if layer.is_scripted:
        return "is TorchScript's: what it receives cannot be seen; recalibrate before scripting"
    if layer.is_lazy:
        return "is lazy and has not been called yet"
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        return "has no running statistics"
    if mean.is_meta or var.is_meta:
        return "is on the meta device"
    if layer.family == "keras" and renorm_statistics(layer.module):
        return "has renorm=True: training makes its variance of statistics that data do not tell"
    return None


def _sharing_statistics(model: nn.Module) -> dict[nn.Module, str]:
    """Return the layers whose running mean is another layer's too, with the reason to refuse.

    One buffer cannot have the statistics of two layers.
    """
    owners: dict[int, list[NormLayer]] = {}
    for layer in find_norms(model):
        if _refusal(layer) is None:
            owners.setdefault(layer.tensors()["running_mean"].data_ptr(), []).append(layer)
    return {
        layer.module: "shares its running statistics with "
        + ", ".join(other.path for other in sharing if other is not layer)
        for sharing in owners.values()
        if len(sharing) > 1
        for layer in sharing
    }
