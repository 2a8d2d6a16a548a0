"""Models that share norms, for the tests of splitting them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stillnorm as sn
from support.layers import conv_input, settle


class Twice(nn.Module):
    """One norm, called twice, on different levels; and one called once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.once = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.p, self.q = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.p(x)).relu()
        return self.once(self.norm(7 * self.q(x) + 5))


class Loop(nn.Module):
    """One norm in a loop, in a block of its own."""

    def __init__(self, times: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.times = times
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.times):
            x = self.norm(self.conv(x).relu() * (3 * i + 1) + i)
        return x


class Levels(nn.Module):
    """A head on several maps: each call of the head is one call of its norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.tail = nn.BatchNorm2d(3)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.head(x), self.head(9 * F.avg_pool2d(x, 2) + 4)
        return self.tail(first) + F.interpolate(second, scale_factor=2)


def names() -> nn.Module:
    """One norm under two names of one parent, and of another."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
    return settle(nn.Sequential(norm, nn.Conv2d(3, 3, 3), norm, inner))


def module_list() -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList([nn.BatchNorm2d(3)] * 3)

        def forward(self, x: Tensor) -> Tensor:
            for i, norm in enumerate(self.norms):
                x = norm((i + 2) * x.relu() + i)
            return x

    torch.manual_seed(0)
    return settle(Net())


NETS: dict[str, Callable[[], nn.Module]] = {
    "twice": Twice, "loop": Loop, "levels": Levels, "names": names, "module list": module_list,
}  # fmt: skip


def data() -> list[Tensor]:
    return [conv_input(n, seed=n) for n in (6, 4, 5)]


def in_train_mode(net: nn.Module, x: Tensor) -> Tensor:
    with sn.preserved(net), torch.no_grad():
        out: Tensor = net.train()(x)
    return out
