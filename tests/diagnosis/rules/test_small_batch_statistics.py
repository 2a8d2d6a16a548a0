"""SN207: batches whose statistics are noise; maps and frozen layers are fine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagnosis.nets import conv_net, data, estimated, found
from stillnorm import check, freeze


def mlp() -> nn.Sequential:
    return estimated(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), rows(64))


def rows(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


def run(net: nn.Module, x: torch.Tensor, size: int) -> dict[str, tuple[str, ...]]:
    return found(check(net, list(x.split(size)), max_batches=None, select="SN207"))


@pytest.mark.parametrize("size", [3, 4, 8])
def test_rows_in_small_batches_are_noise_of_one_over_root_n(size: int) -> None:
    report = check(mlp(), list(rows(64).split(size)), max_batches=None, select="SN207")
    assert found(report) == {"SN207": ("1",)}
    assert report.findings[0].evidence["noise"]["1"] == pytest.approx(size**-0.5, rel=0.1)


class TestNearMisses:
    def test_larger_batches(self) -> None:
        assert run(mlp(), rows(64), 16) == {}

    def test_maps_whose_samples_resemble_each_other(self) -> None:
        x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        assert run(estimated(conv_net(), x), x, 2) == {}

    def test_maps_whose_samples_do_not(self) -> None:
        """No near miss: each image has its own brightness, and positions do not count."""
        x = data(16) + 2 * torch.randn(16, 3, 1, 1)
        assert "SN207" in run(estimated(conv_net(), x), x, 2)

    def test_held(self) -> None:
        net = mlp()
        freeze(net)
        assert run(net, rows(64), 4) == {}


def test_a_crash_for_lack_of_values_is_not_told_twice() -> None:
    net = mlp()
    report = check(net, list(rows(64).split(2)), max_batches=None)
    assert found(report).keys() == {"SN206"}
    assert "SN207 on 1" in next(f for f in report.findings if f.code == "SN206").explains
