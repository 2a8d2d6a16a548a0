"""What the report says: numbers that mean something, text, data."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import stillnorm as sn
from stillnorm import recalibrate
from stillnorm.calibration.report import mean_moved, var_ratio
from support.layers import conv_input, conv_net, settle


def test_mean_moved_is_in_deviations_of_what_the_layer_receives() -> None:
    before, after, var = (
        torch.tensor([0.0, 1.0]),
        torch.tensor([6.0, 1.0]),
        torch.tensor([4.0, 9.0]),
    )
    assert mean_moved(before, after, var, eps=0.0) == pytest.approx(math.sqrt((9 + 0) / 2))


def test_var_ratio_is_a_geometric_mean() -> None:
    before, after = torch.tensor([1.0, 1.0]), torch.tensor([4.0, 1.0])
    assert var_ratio(before, after, eps=0.0) == pytest.approx(2.0)
    assert var_ratio(torch.zeros(2), torch.zeros(2), eps=1e-5) == pytest.approx(1.0)


def test_before_and_after_are_the_statistics_before_and_after() -> None:
    net = conv_net()
    before = [b.clone() for b in (net[1].running_mean, net[1].running_var)]
    layer = recalibrate(net, conv_input()).layers[0]
    assert torch.equal(layer.mean_before, before[0])
    assert torch.equal(layer.var_before, before[1])
    assert torch.equal(layer.mean_after, net[1].running_mean)
    assert torch.equal(layer.var_after, net[1].running_var)
    assert (layer.samples, layer.count) == (4, 4 * 36)


def test_the_text_says_what_was_done_and_what_was_not() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = conv_net()
            self.lost = nn.BatchNorm1d(2)
            self.bare = nn.BatchNorm1d(5, track_running_stats=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bare(self.body(x))

    net = settle(Net())
    sn.freeze(net, "body.6")
    text = str(recalibrate(net, iter([conv_input(), conv_input(3)])))
    assert text.startswith("2 layers recalibrated on 2 batches, 7 samples (pooled)\n")
    assert "body.1" in text
    assert "not reached: lost" in text
    assert "held, left alone: body.6" in text
    assert "has no running statistics" in text


def test_the_layer_that_moved_most_comes_first_and_long_lists_are_cut() -> None:
    net = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(14)))
    x = torch.randn(32, 3) + torch.tensor([0.0, 5.0, 0.0])
    text = str(recalibrate(net, x))
    rows = text.splitlines()
    assert rows[3].split()[0] == "0"
    assert "and 4 more, which moved less" in text


def test_repaired_nan_ranks_first() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    with torch.no_grad():
        net[2].running_var[0] = float("nan")
    text = str(recalibrate(net, 9 * torch.randn(32, 3)))
    assert text.splitlines()[3].split()[0] == "2"


def test_json_is_data() -> None:
    report = recalibrate(conv_net(), conv_input())
    data = json.loads(report.to_json())
    assert data["batches"] == 1
    assert data["layers"][0]["path"] == "1"
    assert len(data["layers"][0]["mean_after"]) == 4
    assert not [key for key in data if key.startswith("_")]


def test_the_page_has_a_bar_for_every_layer_and_the_channels_of_the_worst() -> None:
    net = nn.Sequential(*(nn.BatchNorm1d(3) for _ in range(14)))
    page = recalibrate(net, torch.randn(32, 3) + 1).to_html()
    assert page.count('class="bar') >= 28, "mean and variance of fourteen layers"
    assert page.count("<path") >= 6, "the channels of six"
    assert "nan" not in page.lower()


def test_a_page_of_nothing_and_of_constant_channels() -> None:
    assert "0 layers recalibrated" in recalibrate(nn.Linear(2, 2), torch.randn(4, 2)).to_html()
    assert "nan" not in recalibrate(nn.BatchNorm1d(2), torch.ones(8, 2)).to_html().lower()
