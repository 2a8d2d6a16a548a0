"""SN401: fires on half-precision statistics that are updated or lost, and casts the layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check, freeze
from support.zoo import make, torchvision

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
def test_a_network_that_trains_in_half_precision(dtype: torch.dtype) -> None:
    report = check(estimated(conv_net()).to(dtype))
    assert found(report) == {"SN401": ("1", "4")}
    percent = {torch.float16: "0.49 %", torch.bfloat16: "3.9 %"}[dtype]
    assert percent in report.findings[0].message


@pytest.mark.parametrize("dtype", HALF)
def test_the_average_stops_where_it_says(dtype: torch.dtype) -> None:
    """From below, at momentum 0.01: the last distance that still moves it is half a unit / m."""
    layer = nn.BatchNorm1d(1, momentum=0.01).to(dtype)
    x = torch.tensor([[19.0], [21.0]], dtype=dtype)
    for _ in range(2000):
        layer(x)
    short = 1 - float(layer.running_mean) / 20
    bound = torch.finfo(dtype).eps / 2 / 0.01
    assert 0.1 * bound < short < bound
    message = check(nn.Sequential(layer)).findings[0].message
    assert f"within {100 * bound:.2g} %" in message


def test_one_layer_among_those_of_float32() -> None:
    net = estimated(conv_net())
    net[4].to(torch.bfloat16)
    assert found(check(net)) == {"SN401": ("4",)}


@pytest.mark.parametrize("value", [0.0, 1e-7])
def test_an_underflow_is_found_even_in_a_layer_that_is_held(value: float) -> None:
    net = estimated(conv_net()).half()
    net[4].running_var[2] = value
    freeze(net)
    report = check(net, select="SN401")
    assert found(report) == {"SN401": ("4",)}
    assert report.findings[0].evidence["lost_channels"] == {"4": 1}


def test_in_eval_mode_it_is_a_remark_until_values_are_lost() -> None:
    net = estimated(conv_net()).half().eval()
    assert [f.severity for f in check(net, select="SN401").findings] == ["info"]
    net[1].running_var[0] = 0.0
    report = check(net)
    assert found(report) == {"SN401": ("1", "4")}
    assert "SN104 on 1" in report.findings[0].explains


def test_bfloat16_has_the_range_of_float32() -> None:
    """A variance of 0 in it was 0 before."""
    net = estimated(conv_net()).bfloat16()
    net[4].running_var[2] = 0.0
    freeze(net)
    assert found(check(net, select="SN401")) == {}


def test_without_a_momentum_it_names_no_percentage() -> None:
    net = estimated(conv_net(momentum=None)).half()
    assert "small updates are lost" in check(net, select="SN401").findings[0].message


class TestNearMisses:
    def silent(self, net: nn.Module, given: object = None) -> None:
        report = check(net, given, select="SN401")
        assert (report.findings, report.crashed) == ((), ())

    def test_half_inputs_to_a_layer_of_float32(self) -> None:
        net = estimated(conv_net()).half()
        for path in ("1", "4"):
            net.get_submodule(path).float()
        self.silent(net, [x.half() for x in batches()])

    def test_half_weights_beside_statistics_of_float32(self) -> None:
        net = estimated(conv_net())
        net[1].weight.data = net[1].weight.data.bfloat16()
        self.silent(net)

    def test_double(self) -> None:
        self.silent(estimated(conv_net()).double())

    def test_held_and_foreign_frozen_layers(self) -> None:
        net = estimated(conv_net()).bfloat16()
        freeze(net)
        self.silent(net)
        self.silent(nn.Sequential(torchvision.ops.FrozenBatchNorm2d(4)).half())

    def test_no_statistics(self) -> None:
        net = nn.Sequential(
            nn.LazyBatchNorm1d(dtype=torch.float16),
            nn.BatchNorm1d(4, track_running_stats=False),
            nn.InstanceNorm1d(4),
        )
        self.silent(net.half())

    def test_a_layer_on_the_meta_device_has_lost_nothing(self) -> None:
        net = nn.Sequential(nn.BatchNorm1d(4, device="meta").half())
        assert found(check(net, select="SN401")) == {"SN401": ("0",)}  # its type is known


def test_the_fix_casts_the_whole_layer_and_the_outputs_keep_their_type() -> None:
    net = estimated(conv_net()).bfloat16()
    report = check(net)
    assert report.findings[0].fix.applicability == "unsafe"
    report.fix(unsafe=True)
    assert {t.dtype for t in net[4].parameters()} == {torch.float32}
    assert net.eval()(data(2).bfloat16()).dtype == torch.bfloat16
    assert found(check(net)) == {}


def test_in_a_real_network_at_its_own_layer() -> None:
    model = make("torchvision/resnet18").train()
    model.layer2[0].bn2.half()
    assert found(check(model)) == {"SN401": ("layer2.0.bn2",)}
