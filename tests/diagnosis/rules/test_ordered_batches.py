"""SN309: batches in an order are told from shuffled ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diagnosis.nets import conv_net, data, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis import Report
from support.zoo import images, make

BOTH = ("SN308", "SN309")


def classes(n: int = 128, kinds: int = 8) -> tuple[Tensor, Tensor]:
    """Images whose class is in the mean of their colours, in order of class."""
    y = torch.arange(n) * kinds // n
    means = torch.randn(kinds, 3, 1, 1, generator=torch.Generator().manual_seed(5))
    return data(n) + means[y], y


def codes(report: Report) -> set[str]:
    assert not report.crashed, report.crashed
    return {finding.code for finding in report.findings}


def test_sorted_classes_and_the_same_shuffled() -> None:
    net, dataset = estimated(conv_net()), TensorDataset(*classes())
    report = check(net, DataLoader(dataset, 16), select=BOTH)
    (finding,) = report.findings
    assert finding.code == "SN309"
    assert finding.severity == "warning"
    assert finding.evidence["p"] < 0.002
    assert finding.evidence["ratio"] > 2
    assert finding.fix is None
    g = torch.Generator().manual_seed(0)
    shuffled = DataLoader(dataset, 16, shuffle=True, generator=g)
    assert codes(check(net, shuffled, select=BOTH)) == set()


def test_a_drift_says_that_successive_batches_are_alike() -> None:
    x = data(128) + torch.linspace(0, 2, 128).view(-1, 1, 1, 1)
    (finding,) = check(estimated(conv_net()), list(x.split(16)), select=BOTH).findings
    assert "successive batches are alike" in finding.note
    assert finding.evidence["neighbours"] < 0.5


def test_a_source_for_every_batch_is_not_said_to_be_alike() -> None:
    levels = [0.0, 3.0, 5.0, 1.0, 4.0, 2.0, 0.5, 3.5]
    given = [x + level for x, level in zip(data(128).split(16), levels, strict=True)]
    (finding,) = check(estimated(conv_net()), given, select=BOTH).findings
    assert finding.code == "SN309"
    assert finding.note == ""


def test_frames_of_one_scene_in_each_batch() -> None:
    """Video: 16 noisy copies of one image."""
    scenes = data(8).repeat_interleave(16, 0)
    x = scenes + 0.1 * torch.randn(scenes.shape, generator=torch.Generator().manual_seed(0))
    assert codes(check(estimated(conv_net()), list(x.split(16)), select=BOTH)) == {"SN309"}


@pytest.mark.parametrize("dims", [0, 1, 3])
def test_other_ranks(dims: int) -> None:
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims]
    g = torch.Generator().manual_seed(dims)
    x = torch.randn(128, 6, *[4] * dims, generator=g)
    net = estimated(nn.Sequential(norm(6), nn.ReLU()), x)
    assert codes(check(net, list(x.split(16)), select=BOTH)) == set()
    x += torch.linspace(-1, 1, 128).view(-1, 1, *[1] * dims)
    assert codes(check(net, list(x.split(16)), select=BOTH)) == {"SN309"}


def test_a_preview_runs_by_its_own_name_only() -> None:
    net, given = estimated(conv_net()), list(classes()[0].split(16))
    assert "SN309" not in codes(check(net, given))
    assert codes(check(net, given, select="ordered-batches")) == {"SN309"}


class TestNearMisses:
    @pytest.mark.parametrize("seed", range(10))
    def test_heavy_tailed_samples(self, seed: int) -> None:
        """A few images carry most of the variance, and some batch has to have them."""
        g = torch.Generator().manual_seed(seed)
        x = data(128, seed) * torch.exp(torch.randn(128, 1, 1, 1, generator=g))
        net = estimated(conv_net(), data(64, 50 + seed))
        assert codes(check(net, list(x.split(16)), select=BOTH)) == set()

    def test_few_samples_in_order(self) -> None:
        report = check(estimated(conv_net()), list(classes(24)[0].split(3)), select=BOTH)
        assert codes(report) == set()
        assert len(report.not_run) == 2

    def test_an_order_that_is_none_to_the_norms(self) -> None:
        """Sorted by something that their inputs do not show."""
        x, _ = classes()
        order = torch.randperm(128, generator=torch.Generator().manual_seed(2))
        assert codes(check(estimated(conv_net()), list(x[order].split(16)), select=BOTH)) == set()

    def test_frozen_layers(self) -> None:
        net = estimated(conv_net())
        freeze(net)
        assert codes(check(net, list(classes()[0].split(16)), select=BOTH)) == set()


def test_a_real_architecture() -> None:
    model = make("timm/lcnet_050")
    x = images(64, seed=3, size=32)
    assert codes(check(model, list(x.split(8)), select=BOTH)) == set()
    drifting = x + torch.linspace(0, 2, 64).view(-1, 1, 1, 1)
    assert codes(check(model, list(drifting.split(8)), select=BOTH)) == {"SN309"}
