"""SN307: fires on gradient accumulation; several forwards for one backward are something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from diagnosis import steps
from diagnosis.nets import conv_net, data, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis import Report
from support.zoo import torchvision


def report_of(net: nn.Module, train_step: Any, x: Any = None) -> Report:
    x = data(16) if x is None else x
    report = check(net, x, train_step=train_step, select="SN307")
    assert not report.crashed
    return report


def net_() -> nn.Sequential:
    return estimated(conv_net()).train()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_gradient_accumulation(parts: int, set_to_none: bool) -> None:
    net = net_()
    (finding,) = report_of(net, steps.accumulating(steps.sgd(net), parts, set_to_none)).findings
    assert finding.severity == "info"
    assert finding.paths == ("1", "4")
    assert finding.evidence == {"layers": 2, "forwards": parts, "samples": 16 // parts}
    assert finding.message == (
        f"{parts} forwards per optimizer step: 2 layers normalise by {16 // parts} samples at a "
        "time, not 16"
    )


def test_a_resnet() -> None:
    net = torchvision.models.resnet18(num_classes=4)
    x = torch.randn(8, 3, 32, 32)
    assert len(report_of(net, steps.accumulating(steps.sgd(net)), x).findings[0].paths) == 20
    assert not report_of(net, steps.plain(steps.sgd(net)), x).findings


def test_it_is_in_preview() -> None:
    net = net_()
    step = steps.accumulating(steps.sgd(net))
    assert not check(net, data(16), train_step=step, select="SN3").findings


NEAR_MISSES: dict[str, Any] = {
    "plain": steps.plain,
    "Siamese": steps.siamese,
    "multi-crop": steps.multi_crop,
    "SAM": steps.sam,
    "attack": lambda o: steps.attacking(o, by_backward=True),
    "checkpoint": lambda o: steps.checkpointed(o, reentrant=False),
    "reentrant checkpoint": lambda o: steps.checkpointed(o, reentrant=True),
    "validating": steps.validating,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    net = net_()
    assert not report_of(net, NEAR_MISSES[name](steps.sgd(net))).findings


def test_two_steps_in_one() -> None:
    net = net_()
    once = steps.plain(steps.sgd(net))
    assert not report_of(net, lambda model, x: [once(model, part) for part in x.chunk(2)]).findings


def test_held_layers() -> None:
    net = net_()
    freeze(net)
    assert not report_of(net, steps.accumulating(steps.sgd(net))).findings


def test_without_an_optimizer_step_it_cannot_tell() -> None:
    report = report_of(net_(), lambda model, x: steps.loss_of(model(x)).backward())
    assert [missed.reason for missed in report.not_run] == ["train_step takes no optimizer step"]
