"""SN201: one norm, several inputs; and the honest kinds of sharing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check, freeze
from stillnorm.reports import text
from support.fingerprint import Fingerprint


class Shared(nn.Module):
    """Thread 003 in small: one norm before and after a layer that changes everything."""

    def __init__(self, calls: int = 2) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        for _ in range(self.calls - 1):
            x = self.bn(5 + 4 * self.conv(x).relu())
        return self.head(x.mean((2, 3)))


class Siamese(Shared):
    """The same norms on two halves of the image, drawn alike."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.bn(x[..., :4]) - self.bn(x[..., 4:]).abs()).mean((2, 3)))


def net(kind: type[Shared] = Shared, **how: int) -> Shared:
    return estimated(kind(**how))


def test_a_norm_called_on_two_distributions_is_found_with_its_lines() -> None:
    report = check(net(), batches())
    (finding,) = [f for f in report.findings if f.code == "SN201"]
    assert (finding.severity, finding.paths) == ("error", ("bn",))
    assert finding.evidence["calls"] == {"bn": 2}
    lines = [int(site.rpartition(":")[2]) for site in finding.where]
    source = __import__("pathlib").Path(__file__).read_text().splitlines()
    assert ["self.bn(" in source[line - 1] for line in lines] == [True, True]


def test_it_explains_the_mismatch_of_the_same_layer() -> None:
    model = net()
    model.bn.running_mean += 10
    report = check(model, batches())
    assert found(report) == {"SN201": ("bn",)}
    assert report.findings[0].explains == "SN105 on bn (not repeated)"


def test_the_sentence_and_the_numbers() -> None:
    report = check(net(calls=3), batches(), select="SN201")
    shown = text.write(report.document())
    assert "bn normalises three different inputs with one set of statistics" in shown
    assert "call 3" in shown
    assert "fits none" in shown


def test_the_measured_head_shows_that_recalibration_does_not_help() -> None:
    """Train mode separates the classes, eval does not, recalibrated neither."""
    torch.manual_seed(0)
    model = Shared().train()
    x = data(128)
    y = (x.mean((1, 2, 3)) > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    pairs = list(zip(x.split(32), y.split(32), strict=True))
    report = check(model, pairs, score=lambda out, pair: (out.argmax(1) == pair[1]).float().mean())
    assert report.head.batch > 0.9
    assert report.head.eval < report.head.batch - 0.2
    assert report.head.recalibrated < report.head.batch - 0.1
    assert report.verdict.choice == "repair"


class TestFix:
    def test_the_split_leaves_nothing_to_find_and_can_be_undone(self) -> None:
        model = net()
        before = Fingerprint(model)
        report = check(model, batches())
        (finding,) = [f for f in report.findings if f.code == "SN201"]
        assert Fingerprint(model) == before
        assert finding.fix is not None
        assert (finding.fix.action, finding.fix.applicability) == ("split", "unsafe")
        assert finding.fix.paths == ("bn",)
        applied = report.fix(unsafe=True)
        assert found(check(model, batches())) == {}
        applied.undo()
        assert found(check(model, batches())) == {"SN201": ("bn",)}

    def test_a_layer_that_is_called_past_its_registration_gets_none(self) -> None:
        class Past(Shared):
            def __init__(self) -> None:
                super().__init__()
                self.also = [self.bn]

            def forward(self, x: Tensor) -> Tensor:
                x = self.also[0](5 + 4 * self.conv(self.bn(x)).relu())
                return self.head(x.mean((2, 3)))

        model = net(Past)
        before = Fingerprint(model)
        (finding,) = check(model, batches(), select="SN201").findings
        assert finding.fix is None
        assert Fingerprint(model) == before

    def test_calls_in_several_forwards_get_none(self) -> None:
        def twice(model: nn.Module, x: Tensor) -> Tensor:
            return model(x) + model(9 + 3 * x)

        model = estimated(conv_net())
        (finding,) = check(model, batches(), forward=twice, select="SN201").findings
        assert finding.fix is None

    def test_of_two_layers_the_one_that_can_be_split(self) -> None:
        class Both(Shared):
            def __init__(self) -> None:
                super().__init__()
                self.past = nn.BatchNorm2d(3)
                self.also = [self.past]

            def forward(self, x: Tensor) -> Tensor:
                x = self.also[0](9 + 3 * self.conv(self.past(x)).relu())
                return super().forward(x)

        model = net(Both)
        (finding,) = check(model, batches(), select="SN201").findings
        assert set(finding.paths) == {"bn", "past"}
        assert finding.fix is not None
        assert finding.fix.paths == ("bn",)


class TestNearMisses:
    def test_one_norm_per_call(self) -> None:
        model = net()
        model.other = nn.BatchNorm2d(3)
        model.forward = lambda x: model.head(
            model.other(5 + 4 * model.conv(model.bn(x)).relu()).mean((2, 3))
        )
        estimated(model)
        assert found(check(model, batches(), select="SN201")) == {}

    @pytest.mark.parametrize("seed", range(5))
    def test_a_siamese_network(self, seed: int) -> None:
        assert found(check(net(Siamese), batches(seed=seed))) == {}

    def test_a_held_layer_uses_the_same_statistics_in_both_modes(self) -> None:
        model = net()
        freeze(model)
        assert found(check(model, batches())) == {}

    def test_instance_norm(self) -> None:
        model = Shared()
        model.bn = nn.InstanceNorm2d(3, affine=True, track_running_stats=True)
        assert found(check(estimated(model), batches(), select="SN201")) == {}
