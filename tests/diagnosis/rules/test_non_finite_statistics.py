"""SN102: fires on one poisoned channel, names it, and recalibration heals it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, estimated, found
from stillnorm import check


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_one_value_is_enough(name: str, value: float) -> None:
    net = estimated(conv_net())
    getattr(net[4], name)[3] = value
    for report in (check(net), check(net, batches())):
        assert found(report) == {"SN102": ("4",)}
        assert report.findings[0].evidence["first_channel"] == 3


def test_layers_after_the_poisoned_one_are_not_accused() -> None:
    """In eval everything after it is NaN; the statistics there are right."""
    net = estimated(conv_net())
    net[1].running_var[0] = torch.nan
    assert found(check(net, batches())) == {"SN102": ("1",)}


class TestNearMisses:
    def test_finite_statistics(self) -> None:
        assert found(check(estimated(conv_net()), batches())) == {}

    def test_huge_and_tiny_statistics(self) -> None:
        net = estimated(conv_net())
        net[1].running_var[0], net[1].running_var[1] = 3e38, 1e-45
        assert found(check(net, select="SN102")) == {}

    def test_no_statistics(self) -> None:
        assert found(check(conv_net(track_running_stats=False), select="SN102")) == {}

    def test_a_layer_that_has_no_values_yet(self) -> None:
        with torch.device("meta"):
            net = conv_net()
        assert found(check(net)) == {}
        assert found(check(nn.Sequential(nn.LazyBatchNorm2d()))) == {}


def test_the_fix_heals_it() -> None:
    net = estimated(conv_net())
    net[1].running_mean[2] = torch.nan
    check(net, batches()).fix(unsafe=True)
    assert found(check(net, batches())) == {}
    assert net[1].running_mean.isfinite().all()
