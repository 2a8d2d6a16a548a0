"""Foreign frozen layers: recognised by name and buffers, without importing their package."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import stillnorm as sn
from stillnorm.norms import find_norms
from support import oracles
from support.zoo import timm, torchvision, transformers


class FrozenBatchNorm2d(nn.Module):
    """detectron2's layer, as its file has it (detectron2/layers/batch_norm.py)."""

    _version = 3

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


class MaskRCNNFrozenBatchNorm2d(nn.Module):
    """maskrcnn-benchmark's and apex's, which add no eps and know no number of features."""

    def __init__(self, n: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.running_var.rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


def of_detectron2() -> nn.Module:
    class Theirs(FrozenBatchNorm2d):
        pass

    Theirs.__name__ = "FrozenBatchNorm2d"
    Theirs.__module__ = "detectron2.layers.batch_norm"
    return Theirs(4)


def of_transformers(name: str) -> nn.Module:
    module = getattr(transformers.models, name)
    file = getattr(module, f"modeling_{name}")
    (kind,) = [
        thing
        for key, thing in vars(file).items()
        if "Frozen" in key and "BatchNorm" in key and isinstance(thing, type)
    ]
    return kind(4)  # type: ignore[no-any-return]


# name: (factory, provider, the eps that its forward uses)
FOREIGN = {
    "torchvision": (lambda: torchvision.ops.FrozenBatchNorm2d(4), "torchvision", 1e-5),
    "torchvision eps": (lambda: torchvision.ops.FrozenBatchNorm2d(4, eps=0.2), "torchvision", 0.2),
    "timm": (lambda: timm.layers.FrozenBatchNormAct2d(4, eps=0.1), "timm", 0.1),
    "detectron2": (of_detectron2, "detectron2", 1e-5),
    "a copy of it": (lambda: FrozenBatchNorm2d(4, eps=0.3), __name__.partition(".")[0], 0.3),
    "without eps": (lambda: MaskRCNNFrozenBatchNorm2d(4), __name__.partition(".")[0], 0.0),
} | {
    f"transformers {name}": (lambda name=name: of_transformers(name), "transformers", 1e-5)
    for name in ("detr", "conditional_detr", "rt_detr", "table_transformer")
}


@pytest.mark.parametrize("name", FOREIGN)
def test_is_read_as_it_computes(name: str) -> None:
    """eps and the rest by the float64 formula; timm's has a ReLU behind it."""
    make, provider, eps = FOREIGN[name]
    layer = make()
    g = torch.Generator().manual_seed(1)
    for key, tensor in layer.named_buffers():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(4, generator=g) + (0.1 if "var" in key else -0.5))
    x = torch.randn(3, 4, 5, 5, generator=g)
    (norm,) = find_norms(layer)
    assert (norm.family, norm.provider, norm.num_features) == ("frozen", provider, 4)
    assert norm.eps == eps
    expected = oracles.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.eps,
    )
    y = layer(x).double()
    torch.testing.assert_close(
        y, expected.relu() if name == "timm" else expected, rtol=1e-4, atol=1e-4
    )
    for training in (True, False):
        assert norm.normalizes_by(training) == "running"
        assert not norm.updates_statistics(training)
    assert not norm.trains_affine
    assert norm.hold is None


@pytest.mark.parametrize("name", FOREIGN)
def test_is_already_frozen_and_cannot_be_unfrozen(name: str) -> None:
    make, provider, _ = FOREIGN[name]
    net = nn.Sequential(make())
    assert sn.freeze(net, strict=True).already_frozen == ("0",)
    assert sn.is_frozen(net)
    assert provider in sn.unfreeze(net).refused[0][1]


def test_no_provider_is_imported() -> None:
    """Looking for their layers must not load a package of theirs."""
    code = (
        "import sys, torch, stillnorm\n"
        "from stillnorm.norms import find_norms\n"
        "find_norms(torch.nn.Sequential(torch.nn.BatchNorm2d(2)))\n"
        "loaded = {'torchvision', 'timm', 'transformers', 'detectron2'} & set(sys.modules)\n"
        "sys.exit(f'imported: {loaded}' if loaded else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
