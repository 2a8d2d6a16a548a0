"""SN105: fires at the layer whose statistics are wrong, says how much, is silent on noise."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check, freeze
from support.zoo import torchvision


def with_fault(path: str, mean: float = 0.0, var: float = 1.0) -> nn.Sequential:
    net = estimated(conv_net())
    layer = net.get_submodule(path)
    layer.running_mean += mean * layer.running_var.sqrt()
    layer.running_var *= var
    return net


@pytest.mark.parametrize("path", ["1", "4"])
@pytest.mark.parametrize("fault", [{"mean": 1.0}, {"mean": -1.0}, {"var": 4.0}, {"var": 0.25}])
def test_a_wrong_mean_or_variance_is_found_at_its_own_layer(path: str, fault: dict) -> None:
    assert found(check(with_fault(path, **fault), batches())) == {"SN105": (path,)}


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_batch_size_does_not_matter(size: int) -> None:
    many = batches(size=size)
    assert found(check(estimated(conv_net()), many, select="SN105", max_batches=None)) == {}
    report = check(with_fault("1", mean=1), many, select="SN105", max_batches=None)
    assert found(report) == {"SN105": ("1",)}


def test_an_input_of_another_scale_is_the_first_layers_finding_only() -> None:
    report = check(estimated(conv_net()), [3 * x for x in batches()])
    assert found(report) == {"SN105": ("1",)}


def test_it_says_how_far_and_what_recalibration_repairs() -> None:
    report = check(with_fault("4", mean=1.0, var=4.0), batches(), select="SN105")
    (finding,) = report.findings
    numbers = finding.evidence["layers"]["4"]
    assert numbers["mean"] == pytest.approx(0.5, rel=0.15)  # 1 sigma of a sigma twice too large
    assert numbers["variance_ratio"] == pytest.approx(0.25, rel=0.2)
    assert numbers["mean_recalibrated"] < 0.05
    assert numbers["p"] < 0.002


def test_many_small_errors_are_named_when_the_score_says_that_they_cost() -> None:
    """Each is under the threshold, and together they are what recalibration repairs."""
    net = estimated(conv_net())
    for path in ("1", "4"):
        layer = net.get_submodule(path)
        layer.running_mean += 0.2 * layer.running_var.sqrt()
    assert found(check(net, batches())) == {}
    for gain, expected in ((0.0, {}), (0.2, {"SN105": ("1", "4")})):
        passes = iter([0.5] * 8 + [0.5 + gain] * 4)
        report = check(
            net, batches(), score=lambda out, _, passes=passes: next(passes), select="SN105"
        )
        assert found(report) == expected


def test_below_32_samples_it_is_a_remark() -> None:
    report = check(with_fault("1", mean=1), batches(n=16), select="SN105")
    (finding,) = report.findings
    assert finding.severity == "info"
    assert "from 32 on" in finding.note


def test_weights_that_moved_under_statistics_that_did_not() -> None:
    """Pruning, merging, an optimizer that ran under momentum 0."""
    net = estimated(conv_net())
    with torch.no_grad():
        net[3].weight.mul_(3)
    assert found(check(net, batches())) == {"SN105": ("4",)}


class TestNearMisses:
    @pytest.mark.parametrize("seed", range(10))
    def test_a_healthy_network_on_fresh_data(self, seed: int) -> None:
        torch.manual_seed(seed)
        net = estimated(conv_net(), data(seed=100 + seed))
        assert check(net, batches(seed=seed), select="SN105").findings == ()

    def test_a_network_fine_tuned_while_held(self) -> None:
        """Its statistics no longer describe the data, and train and eval agree all the same."""
        net = with_fault("1", mean=1)
        freeze(net)
        (finding,) = check(net, batches(), select="SN105").findings
        assert (finding.code, finding.severity, finding.fix) == ("SN105", "info", None)
        assert finding.paths[0] == "1"  # what it feeds is other than before too

    def test_a_foreign_frozen_layer(self) -> None:
        net = estimated(conv_net())
        net[1] = torchvision.ops.FrozenBatchNorm2d(8)
        net[1].running_mean.fill_(5)
        report = check(estimated(net), batches(), select="SN105")
        assert [(f.code, f.severity) for f in report.findings] == [("SN105", "info")]

    def test_what_comes_after_a_held_layer_is_as_it_was_trained(self) -> None:
        net = with_fault("1", mean=1)
        freeze(net, "1")
        estimated(net)
        assert found(check(net, batches())) == {}

    def test_instance_norm_with_statistics(self) -> None:
        """Its running variance is that inside samples, and rightly smaller than that of all."""
        net = conv_net()
        net[1] = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
        bright = [data(seed=s) + 3 * torch.randn(64, 3, 1, 1) for s in (7, 8)]
        estimated(net, bright[0])
        for _ in range(50):
            net(bright[0])
        assert net[1].running_var.mean() < 0.5 * net[0](bright[1]).var((0, 2, 3)).mean()
        assert found(check(net, list(bright[1].split(16)))) == {}

    def test_video_frames_folded_into_the_batch(self) -> None:
        """Eight copies of eight images are eight samples, not 64: no significance from copies."""

        class Frames(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = estimated(conv_net())

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.net(x.repeat_interleave(8, dim=0))

        report = check(Frames(), [data(8)], select="SN105")
        assert found(report) == {}


def test_the_fix_recalibrates_and_the_finding_is_gone() -> None:
    net = with_fault("4", mean=1)
    report = check(net, batches())
    assert report.findings[0].fix.applicability == "unsafe"
    report.fix(unsafe=True)
    assert found(check(net, batches())) == {}


def test_what_costs_the_users_score_nothing_is_a_remark() -> None:
    net, data = estimated(conv_net()).eval(), batches()
    sound = {id(x): net(x).detach() for x in data}
    net[4].running_mean += 3
    report = check(net, data, score=lambda out, _: 1.0)
    (finding,) = [f for f in report.findings if f.code == "SN105"]
    assert finding.severity == "info"
    assert "your score hardly suffers" in finding.note
    report = check(net, data, score=lambda out, x: -float((out - sound[id(x)]).abs().mean()))
    (finding,) = [f for f in report.findings if f.code == "SN105"]
    assert finding.severity == "error"
