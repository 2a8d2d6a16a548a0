"""SN104: fires on a constant channel among live ones, not on small or silent ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, estimated, found
from stillnorm import check
from support.zoo import make


def collapsed(path: str = "4", value: float = 0.0) -> nn.Sequential:
    net = estimated(conv_net())
    net.get_submodule(path).running_var[3] = value
    return net


@pytest.mark.parametrize("value", [0.0, 1e-12, 5e-9])
def test_a_constant_channel_is_found(value: float) -> None:
    report = check(collapsed(value=value))
    assert found(report) == {"SN104": ("4",)}
    assert report.findings[0].evidence["channels"] == {"4": [3]}
    assert report.findings[0].evidence["gain"]["4"] > 100


def test_it_is_what_comes_out() -> None:
    """The channel moves as its neighbours do, and fifty deviations and more come out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(8)).eval()
    net[0].running_var[3] = 0.0
    out = net(torch.randn(256, 8))
    assert out[:, 3].std() > 50
    assert out[:, :3].std() < 2
    assert found(check(net)) == {"SN104": ("0",)}


def test_in_any_rank_and_dtype() -> None:
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        net = nn.Sequential(kind(8)).double()
        net[0].running_var[0] = 0
        assert found(check(net)) == {"SN104": ("0",)}


def test_data_in_which_the_channel_moves_are_another_finding() -> None:
    """Then the variance is wrong, and recalibration repairs it: one finding, the one with a fix."""
    report = check(collapsed(), batches())
    assert found(report) == {"SN105": ("4",)}
    assert "SN104 on 4" in next(f for f in report.findings if f.code == "SN105").explains


def test_one_sample_that_wakes_the_channel_is_enough_for_a_warning() -> None:
    for value, severity in ((0.0, "info"), (0.1, "info"), (1.0, "warning")):
        net = nn.Sequential(nn.BatchNorm1d(8)).eval()
        net[0].running_var[3] = 0.0
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        x[:, 3] = 0.0
        x[7, 3] = value
        report = check(net, [x], select="SN104,SN105")
        assert [(f.code, f.severity) for f in report.findings] == [("SN104", severity)]


class TestNearMisses:
    def silent(self, net: nn.Module) -> None:
        report = check(net, select="SN104")
        assert (found(report), report.crashed) == ({}, ())

    def test_variances_as_small_as_those_of_pretrained_mobilenets(self) -> None:
        """All channels of a layer are small, over five decades, and the gain undoes that."""
        net = nn.Sequential(nn.BatchNorm2d(96))
        with torch.no_grad():
            net[0].running_var.copy_(torch.logspace(-7, -2, 96))
            net[0].weight.copy_(torch.linspace(0.1, 1, 96))
        assert (net[0].weight / (net[0].running_var + 1e-5).sqrt()).max() > 50  # a large gain
        self.silent(net)

    def test_a_channel_that_is_small_and_alive(self) -> None:
        """A tenth of eps: a third of a deviation comes out of it in ordinary use."""
        self.silent(collapsed(value=1e-6))

    def test_a_dead_channel_with_a_weight_near_zero(self) -> None:
        net = collapsed()
        with torch.no_grad():
            net[4].weight[3] = 1e-3
        self.silent(net)

    def test_a_last_gamma_of_zero(self) -> None:
        net = collapsed()
        nn.init.zeros_(net[4].weight)
        self.silent(net)

    def test_a_layer_that_is_dead_as_a_whole(self) -> None:
        net = estimated(conv_net())
        net[4].running_var.zero_()
        self.silent(net)

    def test_one_channel_has_no_neighbours(self) -> None:
        net = nn.Sequential(nn.BatchNorm1d(1))
        net[0].running_var.zero_()
        self.silent(net)

    def test_broken_statistics_are_other_findings(self) -> None:
        for value, code in ((torch.nan, "SN102"), (-1.0, "SN103")):
            net = collapsed()
            net[4].running_var[0] = value
            assert found(check(net)) == {code: ("4",)}

    def test_no_values(self) -> None:
        self.silent(
            nn.Sequential(
                nn.LazyBatchNorm1d(),
                nn.BatchNorm1d(4, device="meta"),
                nn.BatchNorm1d(4, track_running_stats=False),
                nn.BatchNorm1d(0),
                nn.BatchNorm1d(4, affine=False),
                nn.BatchNorm1d(4, eps=0.0),
            )
        )


def test_in_a_real_network_at_its_own_layer() -> None:
    model = make("torchvision/mobilenet_v2")
    assert found(check(model)) == {}
    layer = model.features[18][1]
    layer.running_var[5] = 0.0
    layer.running_var[:5] += layer.running_var.max()
    with torch.no_grad():
        layer.weight[5] = 60 / (layer.running_var.median() / layer.eps).sqrt()
    assert found(check(model)) == {"SN104": ("features.18.1",)}
