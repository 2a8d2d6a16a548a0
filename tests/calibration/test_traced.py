"""Statistics read off a trace are those that `recalibrate` writes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stillnorm import freeze, recalibrate
from stillnorm.calibration.traced import traced_statistics
from stillnorm.tracing import trace
from support.zoo import images, make


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/lcnet_050", "transformers/resnet"])
def test_they_are_what_recalibrate_writes(name: str) -> None:
    net, batches = make(name), images(12).split(5)
    seen = traced_statistics(net, trace(net, iter(batches), flow="batch"))
    report = recalibrate(net, batches)
    assert {layer.path for layer in seen} == {done.path for done in report.layers}
    for layer, (mean, var) in seen.items():
        deviation = layer.running_var.sqrt()
        assert ((mean - layer.running_mean).abs() / deviation).max() < 1e-5
        torch.testing.assert_close(var, layer.running_var, rtol=1e-5, atol=1e-12)
        assert mean.dtype == layer.running_mean.dtype


class Mixed(nn.Module):
    """A norm called twice, an instance norm, one that is held and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.held, self.never = (nn.BatchNorm2d(3) for _ in range(3))
        self.instance = nn.InstanceNorm2d(3, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.held(self.instance(self.twice(x) + self.twice(3 * x + 1)))


def test_shared_instance_held_and_unreached_layers() -> None:
    net, x = Mixed(), torch.randn(8, 3, 4, 4)
    net.held.running_mean.fill_(0.1)
    freeze(net, "held")
    seen = traced_statistics(net, trace(net, x, flow="batch"))
    recalibrate(net, x)
    assert {layer.path for layer in seen} == {"twice", "instance"}
    for layer, (mean, var) in seen.items():
        torch.testing.assert_close(mean, layer.running_mean)
        torch.testing.assert_close(var, layer.running_var)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_recalibrate_refuses_gives_nothing(value: float) -> None:
    net, x = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)), torch.randn(8, 3, 4, 4)
    x[0, 0, 0, 0] = value
    assert traced_statistics(net, trace(net, x, flow="batch")) == {}


def test_a_single_value_gives_nothing() -> None:
    net = nn.BatchNorm1d(3)
    assert traced_statistics(net, trace(net, torch.randn(1, 3), flow="batch")) == {}
