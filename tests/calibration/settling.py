"""What the tests of the sequential method share: the fixed point, and a model to compute with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import stillnorm as sn
from calibration.received import assert_exact, recording
from stillnorm import recalibrate
from support.layers import conv_input, settle


def batches() -> list[Tensor]:
    return [conv_input(n, seed=n) for n in (5, 4, 2)]


def assert_fixed_point(net: nn.Module, data: list[Tensor]) -> None:
    with recording(net.eval()) as received, torch.no_grad():
        for x in data:
            net(x)
    assert_exact(received)


def settled(net: nn.Module, data: list[Tensor]) -> sn.calibration.RecalibrationReport:
    report = recalibrate(net, data, method="sequential")
    assert_fixed_point(net, data)
    return report


class Net(nn.Module):
    """Three norms, and a forward to be given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.BatchNorm2d(3) for _ in range(3))
        self.p, self.q = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)
        self.how = forward
        self.stored: Any = None
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)
