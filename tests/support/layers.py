"""Norm layers of every kind, and user classes that do everything a user class may do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ReluNorm(nn.BatchNorm2d):
    """A forward of its own with an `F.batch_norm` call of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(
            F.batch_norm(
                x,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                self.training,
                self.momentum,
                self.eps,
            )
        )


class KeywordNorm(nn.BatchNorm2d):
    """The same by keywords, and a second argument to forward."""

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        y = F.batch_norm(
            input=x,
            running_mean=self.running_mean,
            running_var=self.running_var,
            weight=self.weight,
            bias=self.bias,
            training=self.training,
            eps=self.eps,
        )
        return y * scale


class SuperNorm(nn.BatchNorm2d):
    """A forward of its own that calls torch's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class SuperInstanceNorm(nn.InstanceNorm2d):
    """The same of an instance norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class SuperSyncNorm(nn.SyncBatchNorm):
    """The same of a synchronised norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class MixinNorm(Doubling, nn.BatchNorm2d):
    """A mixin's forward before torch's."""


class GrandchildNorm(SuperNorm):
    """A forward inherited from a user's class."""


class FormulaNorm(nn.BatchNorm2d):
    """A forward that never calls torch's batch norm while it is in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return super().forward(x)
        shape = (1, -1) + (1,) * (x.dim() - 2)
        s = self.weight / torch.sqrt(self.running_var + self.eps)
        return (x - self.running_mean.view(shape)) * s.view(shape) + self.bias.view(shape)


class GatedNorm(nn.BatchNorm2d):
    """Computes its scale from the weight and a parameter of its own that is no affine."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gate = nn.Parameter(torch.linspace(0.5, 1.5, channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight * self.gate,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )


class CountingNorm(nn.BatchNorm2d):
    """A `train()` of its own that must still be called."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.calls: list[bool] = []

    def train(self, mode: bool = True) -> CountingNorm:
        self.calls.append(mode)
        return super().train(mode)


class StickyNorm(nn.BatchNorm2d):
    """A user's own way to freeze."""

    def train(self, mode: bool = True) -> StickyNorm:
        return super().train(False)


class PickyNorm(nn.BatchNorm2d):
    """A `__getstate__` that names what it saves."""

    def __getstate__(self) -> dict[str, Any]:
        own = nn.BatchNorm2d(1).__dict__
        return {name: value for name, value in self.__dict__.items() if name in own}


class SubclassNorm(nn.BatchNorm2d):
    """A subclass that changes nothing."""


def timm_norm_act(**options: Any) -> nn.Module:
    """Build timm's BatchNormAct2d: a norm with dropout and activation in one layer."""
    from support.zoo import timm  # slow to import; lets torchvision load beside a CPU build

    return timm.layers.BatchNormAct2d(4, **options)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """A layer and the shape of an input to it."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]


def _materialized() -> nn.Module:
    layer = nn.LazyBatchNorm2d()
    layer(torch.randn(2, 4, 3, 3))
    return layer


CASES: dict[str, Case] = {
    "1d-flat": Case(lambda: nn.BatchNorm1d(4), (6, 4)),
    "1d": Case(lambda: nn.BatchNorm1d(4), (3, 4, 7)),
    "2d": Case(lambda: nn.BatchNorm2d(4), (3, 4, 5, 6)),
    "3d": Case(lambda: nn.BatchNorm3d(4), (2, 4, 3, 4, 3)),
    "sync": Case(lambda: nn.SyncBatchNorm(4), (3, 4, 5)),
    "affine=False": Case(lambda: nn.BatchNorm2d(4, affine=False), (3, 4, 5, 6)),
    "momentum=None": Case(lambda: nn.BatchNorm2d(4, momentum=None), (3, 4, 5, 6)),
    "momentum=0": Case(lambda: nn.BatchNorm2d(4, momentum=0.0), (3, 4, 5, 6)),
    "eps=0.3": Case(lambda: nn.BatchNorm2d(4, eps=0.3), (3, 4, 5, 6)),
    "lazy": Case(_materialized, (3, 4, 5, 6)),
    "instance1d": Case(
        lambda: nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (3, 4, 7)
    ),
    "instance2d": Case(
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (3, 4, 5, 6)
    ),
    "instance3d": Case(lambda: nn.InstanceNorm3d(4, track_running_stats=True), (2, 4, 3, 4, 3)),
    "subclass": Case(lambda: SubclassNorm(4), (3, 4, 5, 6)),
    "timm BatchNormAct2d": Case(timm_norm_act, (3, 4, 5, 6)),
    "own F.batch_norm": Case(lambda: ReluNorm(4), (3, 4, 5, 6)),
    "own by keywords": Case(lambda: KeywordNorm(4), (3, 4, 5, 6)),
    "own super().forward": Case(lambda: SuperNorm(4), (3, 4, 5, 6)),
    "instance super().forward": Case(
        lambda: SuperInstanceNorm(4, affine=True, track_running_stats=True), (3, 4, 5, 6)
    ),
    "sync super().forward": Case(lambda: SuperSyncNorm(4), (3, 4, 5, 6)),
    "mixin": Case(lambda: MixinNorm(4), (3, 4, 5, 6)),
    "grandchild": Case(lambda: GrandchildNorm(4), (3, 4, 5, 6)),
    "own formula": Case(lambda: FormulaNorm(4), (3, 4, 5, 6)),
    "own gate": Case(lambda: GatedNorm(4), (3, 4, 5, 6)),
    "own train()": Case(lambda: CountingNorm(4), (3, 4, 5, 6)),
    "own sticky train()": Case(lambda: StickyNorm(4), (3, 4, 5, 6)),
    "own __getstate__": Case(lambda: PickyNorm(4), (3, 4, 5, 6)),
}
if "bias" in inspect.signature(nn.BatchNorm2d).parameters:  # since torch 2.13
    CASES["bias=False"] = Case(lambda: nn.BatchNorm2d(4, bias=False), (3, 4, 5, 6))

# Layers whose eval-mode forward is one batch norm call that can be told from the rest.
CHEAP = [name for name in CASES if name not in ("own formula", "own gate")]


def settle(module: nn.Module, seed: int = 1) -> nn.Module:
    """Give every norm layer in the module statistics and affine away from the initial ones."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in module.modules():
            if getattr(layer, "running_mean", None) is None:
                continue
            layer.running_mean.copy_(torch.randn(layer.running_mean.shape, generator=g))
            layer.running_var.copy_(0.3 + 2 * torch.rand(layer.running_var.shape, generator=g))
            layer.num_batches_tracked.fill_(7)
            if layer.weight is not None:
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=g))
            if layer.bias is not None:
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=g))
    return module


def make(name: str, seed: int = 1) -> nn.Module:
    """Build a case's layer, settled."""
    return settle(CASES[name].make(), seed)


def example(name: str, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return an input to a case's layer."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(CASES[name].shape, generator=g, dtype=torch.float64).to(dtype)


def conv_net(seed: int = 1) -> nn.Sequential:
    """Return a small settled network: conv, norm, relu, twice, and a head."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(6 * 36, 5),
        nn.BatchNorm1d(5),
    )
    return settle(net, seed)  # type: ignore[return-value]


def conv_input(n: int = 4, seed: int = 2) -> Tensor:
    """Return an input to `conv_net`."""
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
