"""SN112: fires on statistics without values and on memory as found, not on skeletons."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, estimated, found
from stillnorm import check
from support.zoo import make


def on_meta(net: nn.Sequential, path: str = "4") -> nn.Sequential:
    layer = net.get_submodule(path)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(layer, name, getattr(layer, name).to("meta"))
    return net


def test_statistics_on_meta_beside_real_weights() -> None:
    report = check(on_meta(estimated(conv_net())))
    assert found(report) == {"SN112": ("4",)}
    assert report.findings[0].evidence["layers"] == {"4": "on the meta device"}


def test_one_of_the_two_on_meta() -> None:
    net = estimated(conv_net())
    net[1].running_var = net[1].running_var.to("meta")
    assert found(check(net)) == {"SN112": ("1",)}


@pytest.mark.parametrize("counted", [-3, 140_696_304_426_304])
def test_an_absurd_count(counted: int) -> None:
    net = estimated(conv_net())
    net[4].num_batches_tracked.fill_(counted)
    net[4].running_mean[0] = 30.0
    for report in (check(net), check(net, batches())):
        assert found(report) == {"SN112": ("4",)}


def test_means_of_the_size_of_pointers_stand_for_all_else_that_is_wrong() -> None:
    net = estimated(conv_net())
    net[4].running_mean[:2] = torch.tensor([1.4e25, 4.6e-41])
    net[4].running_var[:4] = torch.tensor([-1e27, torch.nan, 0, 4.6e-41])
    (finding,) = check(net).findings
    assert (finding.code, finding.paths) == ("SN112", ("4",))
    assert "SN102 on 4" in finding.explains


def test_memory_of_zeros_where_a_new_layer_has_ones() -> None:
    net = conv_net()
    net[1].running_var.zero_()
    assert found(check(net)) == {"SN112": ("1",)}


class TestNearMisses:
    def silent(self, net: nn.Module) -> None:
        report = check(net, select="SN112")
        assert (found(report), report.crashed) == ({}, ())

    def test_a_model_wholly_on_meta(self) -> None:
        with torch.device("meta"):
            net = conv_net()
        self.silent(net)

    def test_a_layer_that_accelerate_offloads(self) -> None:
        net = on_meta(estimated(conv_net()))
        net[4]._hf_hook = object()
        self.silent(net)

    def test_a_new_layer_and_a_legacy_count(self) -> None:
        self.silent(conv_net())
        net = estimated(conv_net())
        net[1].num_batches_tracked.zero_()
        self.silent(net)

    def test_dead_channels_whose_average_decayed_to_denormals(self) -> None:
        net = estimated(conv_net())
        net[4].running_mean[:7], net[4].running_var[:7] = 0.0, 1e-45
        self.silent(net)

    def test_a_cumulative_average_of_a_dead_layer(self) -> None:
        net = estimated(conv_net())
        net[4].running_mean.zero_()
        net[4].running_var.zero_()
        self.silent(net)

    def test_large_statistics_of_data(self) -> None:
        net = estimated(conv_net())
        net[4].running_mean[0], net[4].running_var[0] = 1e15, 1e30
        self.silent(net)

    def test_an_overflow_is_another_finding(self) -> None:
        net = estimated(conv_net())
        net[4].running_mean[0] = torch.inf
        assert found(check(net)) == {"SN102": ("4",)}

    def test_no_statistics(self) -> None:
        self.silent(
            nn.Sequential(
                nn.LazyBatchNorm1d(),
                nn.BatchNorm1d(4, track_running_stats=False),
                nn.BatchNorm1d(0),
                nn.InstanceNorm1d(4),
            )
        )


def test_the_fix_estimates_where_there_is_memory() -> None:
    net = estimated(conv_net())
    net[4].num_batches_tracked.fill_(2**60)
    net[4].running_var.fill_(1e9)
    check(net, batches()).fix(unsafe=True)
    assert found(check(net, batches())) == {}
    assert check(on_meta(net)).findings[0].fix is None


def test_in_a_real_network_at_its_own_layer() -> None:
    model = make("torchvision/shufflenet_v2_x0_5")
    assert found(check(model)) == {}
    layer = model.stage3[0].branch1[1]
    layer.num_batches_tracked.fill_(2**62)
    assert found(check(model)) == {"SN112": ("stage3.0.branch1.1",)}
