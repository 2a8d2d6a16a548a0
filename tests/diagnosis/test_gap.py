"""Which causes of a gap the evidence supports, speaks against, or has not looked at."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, data, estimated
from stillnorm import check


def weighed(net: nn.Module, batches: object, **how: object) -> dict[str, bool | None]:
    report = check(net, batches, **how)
    assert not report.crashed, report.crashed
    return {cause.name: cause.supported for cause in report.gap.causes}


def test_a_healthy_model_has_no_gap() -> None:
    assert check(estimated(conv_net()), batches()).gap is None
    assert check(conv_net()).gap is None


def test_stale_statistics_of_an_inner_layer() -> None:
    net = estimated(conv_net())
    net[4].running_mean += 3
    causes = weighed(net, batches())
    assert causes["stale statistics"] is True
    assert causes["shared layers"] is causes["another domain"] is causes["small batches"] is False
    assert causes["leak between batch mates"] is None  # needs a score, and is in preview


def test_a_layer_with_two_inputs_is_not_called_stale() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.norm(x) + self.norm(4 * x + 3)).mean((2, 3)))

    causes = weighed(estimated(Shared()), batches())
    assert causes["shared layers"] is True
    assert causes["stale statistics"] is False


def test_it_is_said_in_two_lines() -> None:
    net = estimated(conv_net())
    net[4].running_mean += 3
    gap = check(net, batches()).gap
    assert gap.sizes().startswith("eval and batch outputs differ by ")
    assert "; 4 alone makes " in gap.sizes()
    assert gap.sizes().endswith(" %")
    assert "causes: stale statistics (SN105); not: shared layers" in gap.verdict()
    assert "leak between batch mates" in gap.verdict().partition("not tested: ")[2]


def test_a_score_that_differs_is_a_gap_too() -> None:
    net = estimated(conv_net())
    net[4].running_mean += 3
    report = check(net, data(64), score=lambda output, batch: -float(torch.std(output)))
    assert report.gap is not None


def test_what_recalibrating_repairs_is_called_stale_whatever_else_is_wrong() -> None:
    """The screen's third number says so too."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((self.norm(x) + self.norm(4 * x + 3)).mean((2, 3)))

    net = estimated(Shared())
    sound = net.norm.running_mean.clone()
    net.norm.running_mean += 3

    def score(output: Tensor, batch: object) -> float:
        return 0.9 if torch.allclose(net.norm.running_mean, sound, atol=1) else 0.2

    report = check(net, batches(), score=score)
    (stale,) = [cause for cause in report.gap.causes if cause.name == "stale statistics"]
    assert (stale.supported, stale.why) == (True, "recalibrated 90.0 %")
    assert "stale statistics (recalibrated 90.0 %), shared layers (SN201)" in report.gap.verdict()
