"""SN402: names where values stop being finite, and how near they are; not what follows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check, freeze
from support.zoo import images, make


def under_autocast(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.float16):
        return model(x)


def amplified(factor: float, path: int = 3) -> nn.Sequential:
    """Weights so large that what reaches the second norm is; statistics that fit."""
    net = conv_net()
    with torch.no_grad():
        net[path].weight.mul_(factor)
    return estimated(net)


def test_an_overflow_under_autocast_is_found_where_it_arises() -> None:
    net = amplified(1e6)
    assert found(check(net, batches())) == {}
    report = check(net, batches(), forward=under_autocast, select="SN402")
    assert found(report) == {"SN402": ("4",)}
    (finding,) = report.findings
    assert (finding.severity, finding.evidence["dtype"]) == ("error", "float16")


def test_what_follows_is_not_reported() -> None:
    net = amplified(1e6, path=0)
    report = check(net, batches(), forward=under_autocast, select="SN402")
    assert found(report) == {"SN402": ("1",)}


def test_statistics_that_what_follows_contradicts_are_not_reported() -> None:
    net = estimated(conv_net())
    with torch.no_grad():
        net[0].weight.mul_(1e38)
    assert found(check(net, batches(), select=("SN105", "SN402"))) == {"SN402": ("1",)}


def test_near_the_range_explains_no_mismatch() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3)).half()
    report = check(net, [(100 * data(64) + 40_000).half()], select=("SN105", "SN402"))
    assert set(found(report)) == {"SN105", "SN402"}


def test_half_of_the_range_is_a_warning_with_numbers() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3)).half()
    x = data(64).half()
    for part, severity in ((0.4, None), (0.6, "warning")):
        x[5, 1, 2, 3] = -part * 65504
        report = check(net, [x], select="SN402")
        assert [f.severity for f in report.findings] == ([severity] if severity else [])
    assert report.findings[0].evidence["largest"]["0"] == pytest.approx(0.6 * 65504, rel=1e-3)
    assert "60 %" in report.findings[0].message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_batch_that_holds_it_itself(value: float, dtype: torch.dtype) -> None:
    net = estimated(conv_net()).to(dtype)
    x = [part.to(dtype) for part in batches()]
    x[2][3, 1, 4, 4] = value
    report = check(net, x, select="SN402")
    assert found(report) == {"SN402": ("1",)}
    (finding,) = report.findings
    assert finding.evidence["batch"] == 2
    assert finding.note == "the batch itself holds NaN or infinity"


def test_squares_beyond_float32() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4))
    assert found(check(net, [1e20 * torch.randn(64, 4)], select="SN402")) == {"SN402": ("0",)}


def test_in_held_layers_and_instance_norm() -> None:
    net = amplified(1e6)
    freeze(net)
    report = check(net, batches(), forward=under_autocast, select="SN402")
    assert found(report) == {"SN402": ("4",)}
    x = data(64).half()
    x[0, 0, 0, 0] = torch.inf
    net = nn.Sequential(nn.InstanceNorm2d(3)).half()
    assert found(check(net, [x], select="SN402")) == {"SN402": ("0",)}


def test_an_overflow_behind_broken_statistics_shows_with_those_of_the_batch() -> None:
    net = amplified(1e6)
    net[1].running_var[0] = torch.nan
    report = check(net, batches(), forward=under_autocast)
    assert found(report) == {"SN102": ("1",), "SN402": ("4",)}


class TestNearMisses:
    def silent(self, net: nn.Module, given: object, **options: object) -> None:
        report = check(net, given, select="SN402", **options)
        assert (report.findings, report.crashed) == ((), ())

    def test_a_healthy_network_in_every_precision(self) -> None:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            net = estimated(conv_net()).to(dtype)
            self.silent(net, [x.to(dtype) for x in batches()])
        self.silent(estimated(conv_net()), batches(), forward=under_autocast)

    def test_large_values_in_a_type_that_holds_them(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            self.silent(nn.Sequential(nn.BatchNorm2d(3)).to(dtype), [(1e6 * data(64)).to(dtype)])

    @pytest.mark.parametrize("value", [torch.nan, -1.0])
    def test_statistics_that_break_what_follows_are_another_finding(self, value: float) -> None:
        net = estimated(conv_net())
        net[1].running_var[0] = value
        assert set(found(check(net, batches()))) == {"SN102" if value != value else "SN103"}

    def test_no_values(self) -> None:
        self.silent(nn.Sequential(nn.BatchNorm1d(4)).eval().half(), [torch.zeros(0, 4).half()])
        self.silent(nn.Sequential(nn.BatchNorm1d(4)).eval(), [torch.ones(1, 4)])


def test_in_a_real_network_at_its_own_layer() -> None:
    model, given = make("timm/resnet10t"), [images(8, seed=3, size=32)]
    assert found(check(model, given, forward=under_autocast, select="SN402")) == {}
    with torch.no_grad():
        model.layer3[0].conv2.weight.mul_(1e6)
    report = check(model, given, forward=under_autocast, select="SN402")
    assert found(report) == {"SN402": ("layer3.0.bn2",)}
