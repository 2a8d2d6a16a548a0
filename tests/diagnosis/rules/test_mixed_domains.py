"""SN308: domains that take turns are told from order and from chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, data, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis import Report
from support.zoo import images, make, torchvision

BOTH = ("SN308", "SN309")


def turns(n: int = 128, size: int = 16, by: float = 1.0, kinds: int = 2, seed: int = 1) -> list:
    """Batches of several domains, one after the other: images of different brightness."""
    return [x + i % kinds * by for i, x in enumerate(data(n, seed).split(size))]


def codes(report: Report) -> set[str]:
    assert not report.crashed, report.crashed
    return {finding.code for finding in report.findings}


def net_1d() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    return estimated(net, torch.randn(128, 6, generator=torch.Generator().manual_seed(3)))


def test_two_domains_in_turns() -> None:
    report = check(estimated(conv_net()), turns(), select=BOTH)
    (finding,) = report.findings
    assert finding.code == "SN308"
    assert finding.severity == "warning"
    assert finding.paths[0] == "1"
    assert finding.evidence["groups"] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert finding.message.endswith("take turns: 0, 2, 4, 6 and 1, 3, 5, 7")
    assert finding.fix is None


def test_three_domains_and_uneven_batches() -> None:
    net = estimated(conv_net())
    assert codes(check(net, turns(180, 20, kinds=3), select=BOTH, max_batches=9)) == {"SN308"}
    assert codes(check(net, turns(120), select=BOTH)) == {"SN308"}  # the last batch is smaller


def test_domains_that_differ_by_contrast_alone() -> None:
    given = [x * (1 + 2 * (i % 2)) for i, x in enumerate(batches(128))]
    assert codes(check(estimated(conv_net()), given, select=BOTH)) == {"SN308"}


def test_rows() -> None:
    g = torch.Generator().manual_seed(1)
    given = [torch.randn(16, 6, generator=g) + 2 * (i % 2) for i in range(6)]
    assert codes(check(net_1d(), given, select=BOTH)) == {"SN308"}


def test_a_preview_runs_by_its_own_name_only() -> None:
    net, given = estimated(conv_net()), turns()
    assert "SN308" not in codes(check(net, given))
    assert codes(check(net, given, select="mixed-domains")) == {"SN308"}


class TestNearMisses:
    @pytest.mark.parametrize("seed", range(10))
    def test_batches_drawn_at_random(self, seed: int) -> None:
        net = estimated(conv_net(), data(seed=100 + seed))
        assert codes(check(net, batches(128, seed=seed), select=BOTH)) == set()

    def test_domains_in_every_batch(self) -> None:
        mixed = torch.cat(turns())[torch.randperm(128)]
        assert codes(check(estimated(conv_net()), list(mixed.split(16)), select=BOTH)) == set()

    def test_domains_one_after_the_other_are_order(self) -> None:
        given = turns()
        sorted_ = given[::2] + given[1::2]
        assert codes(check(estimated(conv_net()), sorted_, select=BOTH)) == {"SN309"}

    def test_domains_too_near_to_matter(self) -> None:
        given = turns(2048, 256, by=0.1)
        assert codes(check(estimated(conv_net()), given, select=BOTH)) == set()

    def test_where_batches_do_not_matter(self) -> None:
        held = estimated(conv_net())
        freeze(held)
        frozen, instance = conv_net(), conv_net()
        for i in (1, 4):
            frozen[i] = torchvision.ops.FrozenBatchNorm2d(8)
            instance[i] = nn.InstanceNorm2d(8)
        for net in (held, frozen, instance, nn.Conv2d(3, 4, 1)):
            assert codes(check(net, turns(), select=BOTH)) == set()


class TestWhereItCannotTell:
    def reasons(self, net: nn.Module, given: object) -> set[str]:
        report = check(net, given, select=BOTH)
        assert codes(report) == set()
        return {missed.reason for missed in report.not_run}

    def test_few_batches_or_samples(self) -> None:
        few = {"needs 4 batches of at least 2, 32 samples"}
        assert self.reasons(estimated(conv_net()), turns()[:3]) == few
        assert self.reasons(estimated(conv_net()), turns(16, 4)) == few
        assert self.reasons(estimated(conv_net()), turns(64, 1)) == few

    def test_rows_that_are_not_samples(self) -> None:
        class Packed(nn.Module):
            """Sequences of different lengths, one after the other."""

            def __init__(self) -> None:
                super().__init__()
                self.net = net_1d()

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x.repeat(2, 1)[:-1])

        given = [torch.randn(16, 6) for _ in range(4)]
        assert self.reasons(Packed(), given) == {"no norm layer receives one row for each sample"}

    def test_no_batches(self) -> None:
        report = check(estimated(conv_net()), select=BOTH)
        assert {missed.reason for missed in report.not_run} == {"needs batches"}


def test_values_that_are_no_numbers_are_left_out() -> None:
    given = turns()
    given[0][0, 0, 0, 0] = torch.nan
    assert codes(check(estimated(conv_net()), given, select=BOTH)) == set()


def test_half_precision() -> None:
    net = estimated(conv_net()).bfloat16()
    given = [x.bfloat16() for x in turns()]
    assert codes(check(net, given, select=BOTH)) == {"SN308"}


def test_a_real_architecture() -> None:
    model = make("timm/lcnet_050")
    given = list(images(64, seed=3, size=32).split(8))
    assert codes(check(model, given, select=BOTH)) == set()
    in_turns = [x + i % 2 for i, x in enumerate(given)]
    assert codes(check(model, in_turns, select=BOTH)) == {"SN308"}
