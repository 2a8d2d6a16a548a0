"""Frozen layers in half precision: what comes out, and what autograd keeps."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import stillnorm as sn

CHANNELS = 16


@dataclass(frozen=True)
class Frozen:
    """One kind of frozen layer under autocast to half precision.

    Args:
        name: Whose it is.
        dtype: Of what the layer returns: ``"float16"``.
        saved_bytes: What autograd keeps of the activations of convolution, layer and ReLU.
    """

    name: str
    dtype: str
    saved_bytes: int


def under_autocast(seed: int) -> tuple[Frozen, ...]:
    """Measure an ordinary layer in eval mode, torchvision's frozen one, and a held one.

    torchvision's is left out where torchvision is not installed.
    """
    torch.manual_seed(seed)
    trained = nn.BatchNorm2d(CHANNELS)
    trained(torch.randn(8, CHANNELS, 14, 14))
    layers: dict[str, nn.Module] = {"eval()": nn.BatchNorm2d(CHANNELS).eval()}
    if (foreign := _torchvision_frozen()) is not None:
        layers["torchvision's frozen"] = foreign
    layers["stillnorm's held"] = nn.BatchNorm2d(CHANNELS)
    for layer in layers.values():
        layer.load_state_dict(trained.state_dict())
    sn.freeze(layers["stillnorm's held"])
    conv = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
    x = torch.randn(8, CHANNELS, 56, 56)
    return tuple(_measure(name, conv, layer, x) for name, layer in layers.items())


def half_error() -> str:
    """Return what torch says to half weights beside float32 statistics; "" where it does not."""
    bn = nn.BatchNorm2d(CHANNELS).eval()
    for parameter in bn.parameters():
        parameter.data = parameter.data.half()
    try:
        bn(torch.randn(2, CHANNELS, 4, 4).half())
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def _measure(name: str, conv: nn.Module, layer: nn.Module, x: Tensor) -> Frozen:
    own = {
        tensor.untyped_storage().data_ptr()
        for module in (conv, layer)
        for tensor in (*module.parameters(), *module.buffers())
    }
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        # Vectors of one element per channel are not activations: scales, and casts of weights.
        if storage.data_ptr() not in own and tensor.numel() >= x.numel():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autocast("cpu", torch.float16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        y = layer(conv(x))
        torch.relu(y)
    return Frozen(name, str(y.dtype).removeprefix("torch."), sum(kept.values()))


def _torchvision_frozen() -> nn.Module | None:
    try:
        misc = importlib.import_module("torchvision.ops.misc")
    except ImportError:
        return None
    except RuntimeError:
        # Its compiled operators belong to another build of torch. The frozen layer is plain Python
        # and needs none of them; the package needs these two to be known by name.
        for operator in ("nms", "qnms"):
            torch.library.define(
                f"torchvision::{operator}",
                "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
            )
        misc = importlib.import_module("torchvision.ops.misc")
    layer: nn.Module = misc.FrozenBatchNorm2d(CHANNELS)
    return layer
