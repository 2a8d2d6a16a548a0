"""SN310: a network that reads the answer off its batch mates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import conv_net, data, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis import Finding, Report
from stillnorm.diagnosis.evidence import CannotTell
from stillnorm.diagnosis.rules.batch_leak import dealt
from support.fingerprint import Fingerprint
from support.zoo import make

Pair = tuple[Tensor, Tensor]


def accuracy(output: Tensor, batch: Pair) -> float:
    return float(((output.flatten() > 0) == batch[1].bool()).float().mean())


class Reader(nn.Module):
    """Learned from batches of one class: what the batch has in common, not what a sample shows."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.bn(x)).mean(1) - 0.25


class Honest(nn.Module):
    """Every sample shows its class by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)[:, 0] + 3 * (x[:, 0] - 0.25).sign()


def of_one_class(batches: int = 8, size: int = 16) -> list[Pair]:
    """Each batch of one class, which moves every sample by half a deviation."""
    g = torch.Generator().manual_seed(0)
    found = []
    for i in range(batches):
        x = torch.randn(size, 8, generator=g)
        found.append((x - x.mean(0) + 0.5 * (i % 2), torch.full((size,), float(i % 2))))
    return found


def checked(net: nn.Module, given: object, **options: object) -> Report:
    report = check(net, given, select="SN310", **{"score": accuracy, **options})
    assert not report.crashed, report.crashed
    return report


def only(net: nn.Module, given: object, **options: object) -> Finding:
    (finding,) = checked(net, given, **options).findings
    return finding


def test_batches_of_one_class() -> None:
    finding = only(estimated(Reader(), torch.cat([x for x, _ in of_one_class()])), of_one_class())
    assert finding.paths == ("bn",)
    assert finding.severity == "warning"
    assert finding.evidence["original"] == 1
    assert max(finding.evidence["dealt"]) < 0.8
    assert finding.evidence["eval"] < 0.8
    assert finding.fix is None


def test_pairs_in_every_batch() -> None:
    """Positives beside their negatives: the sum of a batch is 0, and gives the pairs away."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(1, affine=False, momentum=None)

        def forward(self, x: Tensor) -> Tensor:
            return (self.bn(x) * x).sum(1)  # the sign of x as long as the batch is centred

    g = torch.Generator().manual_seed(1)
    given = []
    for i in range(8):
        level = 4.0 * (i - 3.5)
        side = torch.tensor([-1.0, 1.0]).repeat(8)
        x = level + side + 0.1 * torch.randn(16, generator=g)
        given.append((x.unsqueeze(1), (side * level > 0).float()))
    assert only(Pairs(), given).code == "SN310"


def test_batches_as_mappings_with_a_forward() -> None:
    given = [{"x": x, "y": y, "name": "train", "scale": 1.0} for x, y in of_one_class()]
    finding = only(
        Reader(),
        given,
        forward=lambda model, batch: model(batch["x"]),
        score=lambda output, batch: accuracy(output, (batch["x"], batch["y"])),
    )
    assert finding.code == "SN310"


def test_the_model_stays_as_it_was_and_nothing_is_drawn() -> None:
    net = Reader().train()
    before = Fingerprint(net)
    only(net, of_one_class())
    assert Fingerprint(net) == before


class TestNearMisses:
    def silent(self, net: nn.Module, given: object, **options: object) -> None:
        report = checked(net, given, **options)
        assert report.findings == ()
        assert report.not_run == ()

    def test_an_honest_network_on_batches_of_one_class(self) -> None:
        """SN309's batches; eval is as good."""
        given = [(x + 2 * y.unsqueeze(1) - 0.75, y) for x, y in of_one_class()]
        self.silent(Honest(), given)

    def test_stale_statistics(self) -> None:
        """Eval is bad, and batches dealt anew are as good as the original ones: SN105."""
        g = torch.Generator().manual_seed(0)
        given = []
        for _ in range(8):
            y = torch.arange(16) % 2
            x = torch.randn(16, 8, generator=g) + 4 * y.unsqueeze(1)
            order = torch.randperm(16, generator=g)
            given.append((x[order], y[order].float()))
        net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 1))
        with torch.no_grad():
            net[1].weight.fill_(1)
            net[1].bias.zero_()
            net[0].running_mean.fill_(20)
        assert "SN105" in {f.code for f in check(net, given, score=accuracy).findings}
        self.silent(net, given)

    @pytest.mark.parametrize("seed", range(5))
    def test_random_batches_of_a_random_network(self, seed: int) -> None:
        torch.manual_seed(seed)
        net = estimated(conv_net())
        given = [(x, (x.mean((1, 2, 3)) > 0).float()) for x in data(128, seed).split(16)]
        self.silent(net, given, score=lambda out, batch: accuracy(out[:, 0], batch))

    def test_where_batches_do_not_matter(self) -> None:
        held = estimated(Reader(), torch.randn(64, 8))
        freeze(held)
        self.silent(held, of_one_class())
        self.silent(nn.Sequential(nn.Linear(8, 1)), of_one_class())


class TestWhereItCannotTell:
    def reason(self, given: object, **options: object) -> str:
        report = checked(Reader(), given, **options)
        assert report.findings == ()
        (missed,) = report.not_run
        return missed.reason

    def test_without_a_score_or_batches(self) -> None:
        assert "score" in self.reason(of_one_class(), score=None)
        report = check(Reader(), select="SN310")
        assert [missed.reason for missed in report.not_run] == ["needs batches"]

    def test_one_batch(self) -> None:
        assert "two batches" in self.reason(of_one_class(1))

    def test_samples_that_are_no_tensors(self) -> None:
        given = [(x, (y, [f"{i}" for _ in range(16)])) for i, (x, y) in enumerate(of_one_class())]
        reason = self.reason(
            given, score=lambda output, batch: accuracy(output, (batch[0], batch[1][0]))
        )
        assert "more than tensors" in reason


class TestDealing:
    def deal(self, batches: list, sizes: list[int]) -> list:
        return dealt(batches, sizes, torch.Generator().manual_seed(0))

    def test_every_sample_keeps_its_target_and_batches_their_sizes(self) -> None:
        x = torch.arange(20.0)
        sizes = [8, 8, 4]
        batches = [(part, {"y": -part}) for part in x.split(sizes)]
        new = self.deal(batches, sizes)
        assert [len(part) for part, _ in new] == sizes
        assert all(torch.equal(part, -target["y"]) for part, target in new)
        assert torch.equal(torch.cat([part for part, _ in new]).sort().values, x)
        assert not torch.equal(torch.cat([part for part, _ in new]), x)

    def test_targets_that_happen_to_be_alike_in_all_batches_are_dealt_too(self) -> None:
        y = torch.arange(4)
        new = self.deal([(torch.randn(4), y.clone()) for _ in range(3)], [4] * 3)
        assert not all(torch.equal(target, y) for _, target in new)

    def test_what_all_batches_share_stays(self) -> None:
        weights = torch.arange(4)
        new = self.deal([(torch.randn(4), weights, None) for _ in range(3)], [4] * 3)
        assert all(kept is weights and none is None for _, kept, none in new)

    @pytest.mark.parametrize(
        "batches",
        [
            [(torch.zeros(2),), (torch.zeros(2), torch.zeros(2))],
            [(torch.zeros(2, 3),), (torch.zeros(2, 4),)],
            [(torch.zeros(2), torch.zeros(1)), (torch.zeros(2), torch.ones(1))],
            [(torch.zeros(2), "a"), (torch.zeros(2), "b")],
        ],
    )
    def test_what_cannot_be_dealt(self, batches: list) -> None:
        with pytest.raises(CannotTell):
            self.deal(batches, [2, 2])


def test_a_real_architecture() -> None:
    model = make("torchvision/mobilenet_v3_small")
    given = [(x, torch.zeros(8)) for x in data(32).repeat(1, 1, 4, 4).split(8)]
    report = checked(model, given, score=lambda out, batch: float((out.argmax(1) == 0).sum()) / 8)
    assert report.findings == ()
