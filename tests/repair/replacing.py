"""What the tests of `replace` share: layers of others, and how functions are compared."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support import layers, oracles
from support.fingerprint import Fingerprint
from support.layers import settle
from support.zoo import timm, torchvision, transformers

# The package has the function under that name.
REPLACE = importlib.import_module("stillnorm.repair.replace")

# Layers of torch's own classes: every kind that keeps the eval function applies.
PLAIN = ["1d-flat", "1d", "2d", "3d", "affine=False", "momentum=None", "momentum=0", "eps=0.3"]
PLAIN += ["lazy", "subclass"] + [name for name in ("bias=False",) if name in layers.CASES]
OWN = [
    name for name in layers.CASES if name.startswith(("own", "mixin", "grandchild", "sync super"))
]


def around(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(layer)


def formula(layer: Any, x: Tensor) -> Tensor:
    return oracles.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps
    )


def exact(net: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = net.eval()(x).detach()
    return out


def no_differences(model: nn.Module, before: Fingerprint) -> None:
    assert not Fingerprint(model, versions=False).differences(before)


class FrozenBatchNorm2d(nn.Module):
    """detectron2's layer, as its file has it (detectron2/layers/batch_norm.py)."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(num_features))
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


def of_transformers(name: str) -> nn.Module:
    module = getattr(transformers.models, name)
    file = getattr(module, f"modeling_{name}")
    names = [k for k in vars(file) if "Frozen" in k and "BatchNorm" in k]
    return getattr(file, names[0])(4)  # type: ignore[no-any-return]


# By name: a factory, and the eps of its forward.
FOREIGN: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "torchvision": (lambda: torchvision.ops.FrozenBatchNorm2d(4, eps=0.2), 0.2),
    "timm": (lambda: timm.layers.FrozenBatchNormAct2d(4, eps=0.1, act_layer=nn.SiLU), 0.1),
    "detectron2": (lambda: FrozenBatchNorm2d(4, eps=0.3), 0.3),
    "detr": (lambda: of_transformers("detr"), 1e-5),
    "rt_detr": (lambda: of_transformers("rt_detr"), 1e-5),
    "table_transformer": (lambda: of_transformers("table_transformer"), 1e-5),
}


def foreign(name: str) -> tuple[nn.Module, float]:
    make, eps = FOREIGN[name]
    layer = make()
    g = torch.Generator().manual_seed(1)
    for key, tensor in layer.named_buffers():
        tensor.copy_(torch.rand(4, generator=g) + (0.1 if "var" in key else -0.5))
    return layer, eps


def act_net() -> nn.Sequential:
    return settle(  # type: ignore[return-value]
        nn.Sequential(
            nn.Conv2d(3, 4, 3),
            layers.timm_norm_act(act_layer=nn.SiLU, eps=0.01),
            nn.Conv2d(4, 4, 1),
            nn.BatchNorm2d(4, eps=0.1, momentum=0.03),
        )
    )
