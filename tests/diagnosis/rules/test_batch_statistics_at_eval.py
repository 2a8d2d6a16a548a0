"""SN107: a warning from the tree, an error when the outputs prove it, never InstanceNorm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check
from support.fingerprint import Fingerprint


def test_without_data_it_is_a_warning() -> None:
    report = check(conv_net(track_running_stats=False))
    assert [(f.code, f.severity, f.paths) for f in report.findings] == [
        ("SN107", "warning", ("1", "4"))
    ]


def test_outputs_that_move_with_the_batch_mates_make_it_an_error() -> None:
    net = conv_net(track_running_stats=False)
    report = check(net, batches())
    (finding,) = report.findings
    assert finding.severity == "error"
    with torch.no_grad():
        x = batches()[0]
        whole = net.eval()(x).double()
        expected = (whole[:8] - net(x[:8])).square().mean().sqrt() / whole.std()
    assert finding.evidence["output_moved"] == pytest.approx(float(expected), rel=1e-4)


class Unused(nn.Module):
    """The untracked norm does not reach the output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = estimated(conv_net())
        self.norm = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        self.norm(x)
        return self.net(x)


def test_outputs_that_do_not_move_leave_it_a_warning() -> None:
    assert check(Unused(), batches()).findings[0].severity == "warning"


@pytest.mark.parametrize("n", [1, 7])
def test_a_batch_that_cannot_be_halved_proves_nothing_or_by_what_is_left(n: int) -> None:
    report = check(conv_net(track_running_stats=False), data(n), select="SN107")
    assert report.findings[0].severity == ("warning" if n == 1 else "error")


def test_a_model_that_insists_on_its_batch_size_leaves_it_a_warning() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net(track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.reshape(16, 3, 8, 8))

    assert check(Fixed(), batches(), select="SN107").findings[0].severity == "warning"


class TestFix:
    def test_without_batches_there_is_none(self) -> None:
        assert check(conv_net(track_running_stats=False)).findings[0].fix is None

    def test_tracking_leaves_nothing_to_find_and_can_be_undone(self) -> None:
        net = conv_net(track_running_stats=False)
        before = Fingerprint(net)
        report = check(net, batches())
        assert Fingerprint(net) == before
        (finding,) = report.findings
        assert finding.fix is not None
        assert (finding.fix.action, finding.fix.applicability) == ("track", "unsafe")
        assert finding.fix.paths == ("1", "4")
        applied = report.fix(unsafe=True)
        assert found(check(net, batches())) == {}
        applied.undo()
        assert found(check(net, batches())) == {"SN107": ("1", "4")}

    def test_a_layer_that_no_batch_reaches_is_left_out(self) -> None:
        net = Unused()
        net.spare = nn.BatchNorm2d(3, track_running_stats=False)
        report = check(net, batches(), select="SN107")
        (finding,) = report.findings
        assert finding.paths == ("norm", "spare")
        assert finding.fix is not None
        assert finding.fix.paths == ("norm",)
        report.fix(unsafe=True)
        assert found(check(net, batches(), select="SN107")) == {"SN107": ("spare",)}


class TestNearMisses:
    def test_instance_norm(self) -> None:
        net = conv_net()
        net[1], net[4] = nn.InstanceNorm2d(8), nn.InstanceNorm2d(8)
        assert found(check(net, batches())) == {}

    def test_tracked_batch_norm(self) -> None:
        assert found(check(estimated(conv_net()), batches())) == {}

    def test_tracking_switched_off_later_still_evaluates_by_statistics(self) -> None:
        net = estimated(conv_net())
        net[1].track_running_stats = False
        assert found(check(net, batches(), select="SN107")) == {}

    def test_a_lazy_layer_that_will_track(self) -> None:
        assert found(check(nn.Sequential(nn.LazyBatchNorm2d()), select="SN107")) == {}
