"""The layers of a torch model that have weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from stillnorm.norms import NormLayer, find_norms, walk
from stillnorm.porting.part import Geometry, a

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NAMES = ("weight", "bias")


@dataclass(frozen=True, eq=False)
class TorchPart:
    """A layer that can be ported.

    Args:
        path: Its path.
        module: The layer.
        geometry: What its Keras twin must be.
        norm: The view on it, where it is a batch norm.
    """

    path: str
    module: nn.Module
    geometry: Geometry
    norm: NormLayer | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that can be ported, by name."""
        if self.norm is not None:
            return {k: t for k, t in self.norm.tensors().items() if k != "num_batches_tracked"}
        found = ((name, getattr(self.module, name)) for name in _NAMES)
        return {name: tensor for name, tensor in found if tensor is not None}


def parts_of(model: nn.Module) -> tuple[list[TorchPart], list[tuple[str, str]]]:
    """Return the layers that can be ported, in registration order; (path, reason) of the others."""
    norms = {norm.module: norm for norm in find_norms(model)}
    parts: dict[nn.Module, TorchPart] = {}
    others: dict[nn.Module, tuple[str, str]] = {}
    for path, module, ancestors in walk(model):
        if module in parts or module in others:
            continue
        if any(above in parts or above in others for above in ancestors):
            continue  # of a parametrized layer
        kind = type(module).__name__
        own = {name: p for name, p in module._parameters.items() if p is not None}
        geometry = _geometry(module, norms.get(module))
        if geometry is not None:
            parts[module] = TorchPart(path, module, geometry, norms.get(module))
        elif parametrize.is_parametrized(module):
            others[module] = path, f"a parametrized {kind} in torch"
        elif any(isinstance(p, UninitializedParameter) for p in own.values()):
            others[module] = path, f"{a(kind)} in torch that has not been called yet"
        elif own:
            names = ", ".join(list(own)[:3])
            others[module] = path, f"{a(kind)} in torch: its {names} cannot be ported"
    return list(parts.values()), list(others.values())


def _geometry(module: nn.Module, norm: NormLayer | None) -> Geometry | None:
    """Return what a layer is; None for what cannot be ported."""
    if parametrize.is_parametrized(module):
        return None
    if norm is not None:
        known = norm.family in ("batch", "frozen") and not norm.is_lazy and not norm.is_scripted
        return Geometry("batch norm", (norm.num_features,)) if known else None
    if not isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)):
        return None
    weight = module.weight
    if isinstance(weight, UninitializedParameter) or not set(module._parameters) <= set(_NAMES):
        return None
    shape, has_bias = tuple(weight.shape), module.bias is not None
    if isinstance(module, nn.Linear):
        return Geometry("dense layer", shape, has_bias)
    kind = "transposed convolution" if isinstance(module, _TRANSPOSED) else "convolution"
    return Geometry(
        kind, shape, has_bias, tuple(module.stride), tuple(module.dilation), module.groups
    )
