"""A fix that is offered has been tried; one that cannot be done is not offered."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diagnosis.nets import estimated
from stillnorm.diagnosis import Finding, Fix
from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.request import Request
from stillnorm.diagnosis.evidence.runs import run_flows
from stillnorm.diagnosis.fixing.trials import tried
from support.fingerprint import Fingerprint


class Shared(nn.Module):
    """One norm, two inputs: train mode gives 0 on average, eval does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack((self.norm(x), self.norm(4 * x + 3)))


def score(output: Tensor, batch: object) -> float:
    """Minus how far the means of both calls are from zero."""
    return -float(output.mean(1).abs().mean())


def evidence(net: nn.Module, **how: object) -> Evidence:
    request = Request(net, list(torch.randn(64, 3).split(16)), **how)
    return Evidence(request, run_flows(request, 8))


def finding(action: str, path: str = "norm") -> Finding:
    return Finding("SN201", "shared-layer", "error", (path,), "shared", fix=fix(action, path))


def fix(action: str, path: str) -> Fix:
    return Fix("do it", "unsafe", action, (path,))


def test_a_fix_is_done_scored_and_taken_back() -> None:
    net = estimated(Shared(), torch.randn(64, 3))
    gathered = evidence(net, score=score)
    before = Fingerprint(net)
    (found,) = tried([finding("split")], gathered)
    assert Fingerprint(net) == before
    assert gathered.measured.head.eval < -0.5
    assert -0.3 < found.fix.measured <= 0  # what 16 samples scatter


def test_recalibration_has_been_measured_already() -> None:
    gathered = evidence(estimated(Shared(), torch.randn(64, 3)), score=score)
    (found,) = tried([finding("recalibrate")], gathered)
    assert found.fix.measured == gathered.measured.head.recalibrated


def test_without_a_score_or_without_need_of_data_nothing_is_tried() -> None:
    net = estimated(Shared(), torch.randn(64, 3))
    (found,) = tried([finding("split")], evidence(net))
    assert found.fix.measured is None
    (found,) = tried([finding("freeze")], evidence(net, score=score))
    assert found.fix.measured is None


def test_what_cannot_be_done_is_not_offered_and_the_reason_is_given() -> None:
    class Once(Shared):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)[None]

    net = estimated(Once(), torch.randn(64, 3))
    gathered = evidence(net, score=score)
    before = Fingerprint(net)
    (found,) = tried([finding("split")], gathered)
    assert Fingerprint(net) == before
    assert found.fix is None
    assert found.note.startswith("no fix is offered: norm cannot be changed: ")
