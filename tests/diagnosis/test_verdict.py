"""Freeze, recalibrate or train: each where it is right, with its three numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, data, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis import Verdict
from stillnorm.diagnosis.evidence.runs import Head


def bright(n: int, seed: int = 1) -> Tensor:
    """Images that differ so much in brightness that two of them are a poor sample."""
    g = torch.Generator().manual_seed(seed)
    return data(n, seed) + 2 * torch.randn(n, 3, 1, 1, generator=g)


def verdict(net: nn.Module, x: Tensor, size: int) -> Verdict:
    return check(net, list(x.split(size)), max_batches=None).verdict


def test_small_batches_beside_good_statistics_freeze() -> None:
    net = estimated(conv_net(), bright(256, seed=2))
    got = verdict(net, bright(64), 2)
    assert (got.choice, got.batch_size) == ("freeze", 2)
    assert got.batch > 0.3 > 0.2 > got.running
    assert got.sentence == (
        f"at 2 samples batch statistics are off by {got.batch:.2f} sigma, your running statistics "
        f"by {got.running:.2f} sigma: freeze"
    ).replace("by 0.00 sigma", "by less than 0.01 sigma")


def test_large_batches_beside_good_statistics_train_on() -> None:
    got = verdict(estimated(conv_net()), data(64), 32)
    assert got.choice == "train"
    assert got.batch < 0.2
    assert got.sentence.endswith("they will do: train")


def test_statistics_that_are_off_recalibrate_and_it_says_what_that_leaves() -> None:
    net = estimated(conv_net())
    net[1].running_mean += 3
    got = verdict(net, data(64), 16)
    assert got.choice == "recalibrate"
    assert got.running > 1
    assert got.recalibrated < 0.1
    assert "your running statistics are off by" in got.sentence


def test_stale_statistics_count_though_another_finding_explains_them() -> None:
    """SN002 stands for SN105 there; the verdict is not "train" for that."""
    net = estimated(conv_net(momentum=0))
    net[1].running_mean += 3
    assert verdict(net, data(64), 16).choice == "recalibrate"


def scored(eval: float, batch: float, recalibrated: float, n: int = 512) -> Verdict:
    """The verdict on a healthy network whose user measures these scores, in order of the passes."""
    passes = iter((eval, batch, recalibrated))
    return check(estimated(conv_net()), [data(n)], score=lambda out, _: next(passes)).verdict


def test_the_users_score_outweighs_sigmas() -> None:
    assert scored(0.84, 0.95, 0.96).choice == "recalibrate"
    assert scored(0.84, 0.95, 0.96).sentence == (
        "your running statistics score 84.0 %, recalibrated 96.0 %: recalibrate, then train"
    )
    assert scored(0.95, 0.55, 0.95).choice == "freeze"
    assert scored(0.95, 0.55, 0.95).sentence == (
        "at 512 samples batch statistics score 55.0 %, your running statistics 95.0 %: freeze"
    )


def test_scores_that_differ_by_less_than_what_matters_decide_nothing() -> None:
    assert scored(0.93, 0.95, 0.96, 128).choice == "train"
    assert scored(-3.1, -3.0, -3.0).choice == "train"
    assert scored(-3.1, -2.0, -2.0).choice == "recalibrate"


def test_a_structural_fault_comes_first_and_says_what_freezing_would_keep() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(9 + 4 * self.bn(x).relu()).mean((2, 3))

    net = estimated(Shared())
    net.bn.running_mean += 3
    report = check(net, batches(), score=lambda out, _: 0.25)
    assert report.verdict.choice == "repair"
    assert report.verdict.sentence == (
        "repair SN201 before anything else; freezing now would keep 25.0 %"
    )


@pytest.mark.parametrize("kind", ["held", "instance"])
def test_where_no_layer_uses_batch_statistics_there_is_nothing_to_decide(kind: str) -> None:
    net = conv_net()
    if kind == "instance":
        net[1], net[4] = nn.InstanceNorm2d(8), nn.InstanceNorm2d(8)
    estimated(net)
    if kind == "held":
        freeze(net)
    assert verdict(net, data(32), 16).choice == "keep"


def test_the_batch_size_is_the_users() -> None:
    net = estimated(conv_net(), bright(256, seed=2))
    noise = [verdict(net, bright(64), size).batch for size in (2, 8, 32)]
    assert noise[0] > noise[1] > noise[2]
    assert noise[0] / noise[2] == pytest.approx(4, rel=0.4)


def test_after_recalibrating_small_batches_freeze_and_large_ones_train_on() -> None:
    net = estimated(conv_net(), bright(256, seed=2))
    net[1].running_mean += 3
    assert [verdict(net, bright(64), size).then for size in (2, 32)] == ["freeze", "train"]
    assert scored(0.84, 0.83, 0.96).then == "freeze"  # the score outweighs sigmas
    assert scored(0.93, 0.95, 0.96, 128).then is None


def test_a_network_that_was_never_trained_is_to_be_trained() -> None:
    got = verdict(conv_net(), data(64), 16)
    assert (got.choice, got.sentence) == ("train", "nothing has been trained yet: train")


def test_two_values_per_channel_are_no_fault_of_the_layer() -> None:
    """SN206 is a crash in training; held, the same network is fine."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    g = torch.Generator().manual_seed(0)
    estimated(net, torch.randn(512, 3, generator=g))
    assert verdict(net, torch.randn(64, 3, generator=g), 2).choice == "freeze"


def test_an_input_that_is_not_the_one_of_training_is_mended_before_anything_is_recalibrated() -> (
    None
):
    g = torch.Generator().manual_seed(0)
    images = torch.rand(64, 3, 8, 8, generator=g) * torch.rand(64, 3, 1, 1, generator=g)
    net = estimated(conv_net(), images)
    report = check(net, list((255 * images).split(16)), score=lambda out, _: 0.5)
    assert [f.code for f in report.findings if f.severity == "error"] == ["SN106"]
    assert report.verdict.sentence.startswith("repair SN106 before anything else")
    assert report.gap.verdict().startswith("causes: input scale (SN106); ")
    assert "recalibrate" not in report.verdict.sentence


@pytest.mark.parametrize(("samples", "matters"), [(16, False), (512, True)])
def test_what_a_score_has_to_gain_depends_on_how_many_samples_it_is_of(
    samples: int, matters: bool
) -> None:
    assert Head(0.953, 1.0, 0.996, samples).recalibration_pays is matters
    assert Head(0.813, 1.0, 1.0, 16).recalibration_pays is False  # 13 of 16, 16 of 16
    assert Head(0.990, 0.995, 0.996, 10**6).recalibration_pays is False  # less than a point


def test_a_mode_that_is_wrong_is_named() -> None:
    net = estimated(conv_net()).train()
    net[1].eval()
    assert verdict(net, data(64), 32).sentence.endswith("they will do: train; mend SN003 first")
