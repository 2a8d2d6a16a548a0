"""SN111: a remark about channels that eps decides, a warning about eps 0."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diagnosis.nets import conv_net, estimated
from stillnorm import check, freeze
from support.zoo import make, torchvision


def said(net: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    report = check(net, select="SN111")
    assert not report.crashed
    return [(finding.severity, finding.paths) for finding in report.findings]


def small(eps: float = 1e-3, channels: int = 8) -> nn.Sequential:
    """Variances of half of eps in the first channels of "4", and of 1 in the others."""
    net = estimated(conv_net(eps=eps))
    net[4].running_var.fill_(1)
    net[4].running_var[:channels] = eps / 2
    return net


def test_most_channels_small_is_a_remark_at_their_own_layer() -> None:
    assert said(small()) == [("info", ("4",))]
    assert said(small(channels=5)) == [("info", ("4",))]
    assert check(small(channels=5)).findings[0].evidence["channels"] == {"4": 5}


def test_a_port_with_another_eps_differs_there_and_not_where_it_is_silent() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8, 4, 4)
    for net, differs in ((small(), True), (estimated(conv_net(eps=1e-3)), False)):
        layer = net[4].eval()
        port = copy.deepcopy(layer)
        port.eps = 1e-5
        given = layer.running_mean[:, None, None] + layer.running_var.sqrt()[:, None, None] * x
        change = (port(given) - layer(given)).std() / layer(given).std()
        assert (change > 0.05) == differs
        assert bool(said(net)) == differs


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_eps_zero_is_a_warning(kind: type[nn.Module]) -> None:
    assert said(nn.Sequential(kind(4, eps=0.0))) == [("warning", ("0",))]


def test_eps_zero_is_what_torch_refuses() -> None:
    with pytest.raises(ValueError, match="eps must be positive"):
        nn.BatchNorm1d(4, eps=0.0).train()(torch.randn(8, 4))


def test_eps_zero_in_a_frozen_layer_counts_where_a_variance_is_zero() -> None:
    layer = torchvision.ops.FrozenBatchNorm2d(4, eps=0.0)
    assert said(nn.Sequential(layer)) == []
    layer.running_var[2] = 0
    assert said(nn.Sequential(layer)) == [("warning", ("0",))]


class TestNearMisses:
    def test_fewer_than_half_of_the_channels(self) -> None:
        assert said(small(channels=4)) == []

    def test_dead_channels_however_many(self) -> None:
        """What puts out nothing puts out nothing with any eps."""
        net = small()
        net[4].running_var[:7] = 1e-12
        net[4].running_var[7] = 1
        assert said(net) == []

    def test_channels_with_a_weight_near_zero(self) -> None:
        net = small(channels=7)
        with torch.no_grad():
            net[4].weight[:7] = 1e-4
        assert said(net) == []

    def test_variances_as_small_as_those_of_pretrained_mobilenets(self) -> None:
        """Dead ones, small ones, and most a few hundredths, at torch's own eps."""
        net = nn.Sequential(nn.BatchNorm2d(96))
        net[0].running_var.copy_(torch.logspace(-8, 0, 96))
        assert (net[0].running_var < 10 * net[0].eps).float().mean() > 0.4
        assert said(net) == []
        net[0].running_var.fill_(2e-5)
        assert said(net) == []

    def test_eps_zero_under_a_hold(self) -> None:
        net = estimated(conv_net())
        for path in ("1", "4"):
            net.get_submodule(path).eps = 0.0
        freeze(net)
        assert said(net) == []

    def test_no_values_and_broken_ones(self) -> None:
        net = nn.Sequential(
            nn.LazyBatchNorm1d(),
            nn.BatchNorm1d(4, device="meta"),
            nn.BatchNorm1d(4, track_running_stats=False),
            nn.BatchNorm1d(0),
            nn.BatchNorm1d(4, affine=False),
            nn.BatchNorm1d(4),
            nn.BatchNorm1d(4),
        )
        net[5].running_var.fill_(torch.nan)
        net[6].running_var.fill_(-1)
        assert said(net) == []

    @pytest.mark.parametrize("name", ["torchvision/mobilenet_v2", "timm/ghostnet_050"])
    def test_real_networks(self, name: str) -> None:
        assert said(make(name)) == []


def test_a_port_that_keeps_an_eps_of_1e_3_beside_small_variances_is_a_remark() -> None:
    """Random weights and eps 1e-3 as in TensorFlow: eps does decide in the last layers."""
    ((severity, paths),) = said(make("torchvision/mobilenet_v3_small"))
    assert severity == "info"
    assert "features.11.block.1.1" in paths


def test_in_a_real_network_at_its_own_layer() -> None:
    model = make("timm/resnet10t")
    model.layer3[0].bn1.running_var.mul_(1e-6)
    assert said(model) == [("info", ("layer3.0.bn1",))]
