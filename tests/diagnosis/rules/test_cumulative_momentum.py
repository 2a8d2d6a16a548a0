"""SN109: a remark, when asked for, about momentum None in a model that trains."""

from __future__ import annotations

import torch
from torch import nn

from diagnosis.nets import conv_net, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis import Report
from support.zoo import make


def codes(net: nn.Module, select: str | None = "SN109") -> list[tuple[str, tuple[str, ...]]]:
    report: Report = check(net, select=select)
    assert not report.crashed
    return [(finding.code, finding.paths) for finding in report.findings]


def test_it_is_a_remark_and_only_by_its_own_name() -> None:
    net = estimated(conv_net(momentum=None))
    assert codes(net) == [("SN109", ("1", "4"))]
    assert codes(net, "cumulative-momentum") == [("SN109", ("1", "4"))]
    assert codes(net, None) == codes(net, "SN1") == []
    assert check(net, select="SN109").findings[0].severity == "info"


def test_it_is_what_torch_does() -> None:
    """The mean of what was first 0 and then 10, ten batches each, is 5."""
    layer = nn.BatchNorm1d(2, momentum=None)
    for value in (0.0, 10.0):
        for _ in range(10):
            layer(value + torch.tensor([[-1.0, 1.0], [1.0, -1.0]]))
    assert torch.allclose(layer.running_mean, torch.tensor(5.0))


class TestNearMisses:
    def test_a_momentum(self) -> None:
        assert codes(conv_net()) == []

    def test_a_model_that_does_not_train(self) -> None:
        assert codes(conv_net(momentum=None).requires_grad_(False)) == []

    def test_held_layers(self) -> None:
        net = estimated(conv_net(momentum=None))
        freeze(net)
        assert codes(net) == []

    def test_layers_without_statistics_or_tracking(self) -> None:
        assert codes(conv_net(momentum=None, track_running_stats=False)) == []
        net = conv_net(momentum=None)
        net[1].track_running_stats = net[4].track_running_stats = False
        assert codes(net) == []

    def test_instance_norm_to_which_none_is_zero(self) -> None:
        assert codes(nn.Sequential(nn.InstanceNorm2d(4, True, track_running_stats=True))) == []

    def test_a_momentum_back_after_a_cumulative_estimate(self) -> None:
        assert codes(make("timm/lcnet_050")) == []
