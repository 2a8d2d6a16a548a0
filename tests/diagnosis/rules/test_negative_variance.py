"""SN103: fires on one variance below zero, and says what eval makes of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check
from support.zoo import make, torchvision


def with_variance(value: float, path: str = "4") -> nn.Sequential:
    net = estimated(conv_net())
    net.get_submodule(path).running_var[3] = value
    return net


@pytest.mark.parametrize("value", [-1e-38, -1e-9, -0.5, -1e30])
def test_one_channel_is_enough(value: float) -> None:
    for report in (check(with_variance(value)), check(with_variance(value), batches())):
        assert found(report) == {"SN103": ("4",)}
        assert report.findings[0].evidence["channels"] == {"4": 1}


def test_it_says_nan_only_where_eval_gives_nan() -> None:
    for value, is_nan in ((-0.5, True), (-1e-9, False)):
        net = with_variance(value).eval()
        assert net(data(2)).isnan().any() == is_nan
        assert ("NaN" in check(net).findings[0].message) == is_nan


def test_the_most_negative_layer_stands_first() -> None:
    net = with_variance(-0.1, "1")
    net[4].running_var[0] = -0.2
    assert found(check(net)) == {"SN103": ("4", "1")}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_in_any_dtype(dtype: torch.dtype) -> None:
    assert found(check(with_variance(-0.5).to(dtype), select="SN103")) == {"SN103": ("4",)}


def test_in_instance_norm_and_in_another_librarys_frozen_layer() -> None:
    net = nn.Sequential(
        nn.InstanceNorm2d(4, track_running_stats=True), torchvision.ops.FrozenBatchNorm2d(4)
    )
    for layer in net:
        layer.running_var[0] = -1
    assert found(check(net)) == {"SN103": ("0", "1")}


class TestNearMisses:
    @pytest.mark.parametrize("value", [0.0, -0.0, 1e-45])
    def test_zero_of_either_sign(self, value: float) -> None:
        assert found(check(with_variance(value), select="SN103")) == {}

    def test_infinity_is_another_finding(self) -> None:
        assert found(check(with_variance(-torch.inf))) == {"SN102": ("4",)}

    def test_no_values(self) -> None:
        net = nn.Sequential(
            nn.LazyBatchNorm1d(),
            nn.BatchNorm1d(4, device="meta"),
            nn.BatchNorm1d(4, track_running_stats=False),
            nn.BatchNorm1d(0),
        )
        report = check(net, select="SN103")
        assert (found(report), report.crashed) == ({}, ())


def test_the_fix_estimates_it_anew() -> None:
    net = with_variance(-0.5)
    check(net, batches()).fix(unsafe=True)
    assert (net[4].running_var > 0).all()
    assert found(check(net, batches())) == {}


def test_in_a_real_network_at_its_own_layer() -> None:
    model = make("timm/resnet10t")
    assert found(check(model)) == {}
    model.layer2[0].bn1.running_var[7] = -0.01
    assert found(check(model)) == {"SN103": ("layer2.0.bn1",)}
