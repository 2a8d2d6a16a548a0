"""SN302: fires on forwards that train nothing, and not on several that all train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagnosis import steps
from diagnosis.nets import conv_net, data, estimated
from stillnorm import check, eval_mode, freeze, no_updates
from stillnorm.diagnosis import Report
from support.zoo import torchvision


def report_of(net: nn.Module, train_step: Any, x: Tensor | None = None, **given: Any) -> Report:
    x = data(16) if x is None else x
    report = check(net, x, train_step=train_step, select="SN302", **given)
    assert not report.crashed
    return report


def net_() -> nn.Sequential:
    return estimated(conv_net()).train()


@pytest.mark.parametrize(
    ("make", "updates", "idle", "displaced"),
    [
        (steps.sam, 2, 1, 1),
        (lambda o: steps.sam(o, data=True), 2, 1, 1),
        (lambda o: steps.attacking(o, by_backward=False), 3, 2, 0),
        (lambda o: steps.attacking(o, by_backward=True, steps=5), 6, 5, 0),
        (steps.virtual_adversarial, 3, 1, 0),
    ],
    ids=["SAM", "SAM by assignment", "PGD by grad", "PGD by backward", "VAT"],
)
def test_forwards_that_look_for_something(
    make: Any, updates: int, idle: int, displaced: int
) -> None:
    net = net_()
    (finding,) = report_of(net, make(steps.sgd(net))).findings
    assert finding.severity == "warning"
    assert finding.paths == ("1", "4")
    assert finding.evidence == {
        "layers": 2,
        "updates": updates,
        "train nothing": idle,
        "weights taken back": displaced,
    }
    assert len(finding.table.rows) == updates
    assert all(line.startswith("steps.py:") for line in finding.where)


def test_what_it_says_of_sam() -> None:
    net = net_()
    (finding,) = report_of(net, steps.sam(steps.sgd(net))).findings
    assert finding.message == (
        "one training step updates the statistics of 2 layers 2 times: 1 forward trains nothing, "
        "1 forward with weights that are taken back"
    )
    assert [row[2:] for row in finding.table.rows] == [
        ("kept", "dropped before a step"),
        ("taken back", "trains"),
    ]


def test_an_output_that_nobody_trains_on() -> None:
    """Accuracy in train mode, with gradients on."""
    net = net_()
    step = steps.plain(steps.sgd(net))

    def train_step(model: nn.Module, x: Tensor) -> None:
        step(model, x)
        model(x).argmax(1)

    (finding,) = report_of(net, train_step).findings
    assert finding.evidence["train nothing"] == 1


def test_the_closure_of_lbfgs() -> None:
    net = net_()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)

    def train_step(model: nn.Module, x: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = steps.loss_of(model(x))
            loss.backward()
            return loss

        optimizer.step(closure)

    (finding,) = report_of(net, train_step).findings
    assert finding.evidence["updates"] == 3


@pytest.mark.parametrize("quietly", [no_updates, eval_mode])
def test_the_cure(quietly: Any) -> None:
    net = net_()
    assert not report_of(net, steps.sam(steps.sgd(net), quietly)).findings


def test_a_resnet_under_sam_and_with_the_cure() -> None:
    net = torchvision.models.resnet18(num_classes=4)
    x = torch.randn(4, 3, 32, 32)
    assert len(report_of(net, steps.sam(steps.sgd(net)), x).findings[0].paths) == 20
    assert not report_of(net, steps.sam(steps.sgd(net), no_updates), x).findings
    assert not report_of(net, steps.plain(steps.sgd(net)), x).findings


def test_without_affine_parameters_the_gradients_of_others_tell() -> None:
    net = estimated(conv_net(affine=False)).train()
    assert report_of(net, steps.sam(steps.sgd(net))).findings
    assert not report_of(net, steps.accumulating(steps.sgd(net))).findings


NEAR_MISSES: dict[str, Any] = {
    "plain": steps.plain,
    "accumulation": steps.accumulating,
    "accumulation with zeroed gradients": lambda o: steps.accumulating(o, 4, set_to_none=False),
    "multi-crop": steps.multi_crop,
    "Siamese": steps.siamese,
    "checkpoint": lambda o: steps.checkpointed(o, reentrant=False),
    "reentrant checkpoint": lambda o: steps.checkpointed(o, reentrant=True),
    "validation": steps.validating,
    "gradient penalty": steps.penalised,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    net = net_()
    assert not report_of(net, NEAR_MISSES[name](steps.sgd(net))).findings


def test_a_gan() -> None:
    model = steps.Both()
    train_step, _ = steps.gan_step(model)
    assert not report_of(model, train_step).findings


def test_a_layer_that_is_called_twice_in_one_forward() -> None:
    """That is SN201's."""
    norm = nn.BatchNorm2d(8)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 8, 1), norm)
    assert not report_of(net, steps.plain(steps.sgd(net))).findings


def test_accumulation_without_an_optimizer_step() -> None:
    """A trainer takes the step elsewhere."""

    def train_step(model: nn.Module, x: Tensor) -> None:
        for part in x.chunk(2):
            steps.loss_of(model(part)).backward()

    assert not report_of(net_(), train_step).findings


def test_without_a_backward_it_cannot_tell() -> None:
    """Lightning's training_step returns the loss."""
    one = report_of(net_(), lambda model, x: steps.loss_of(model(x)))
    assert not one.findings
    assert not one.not_run
    two = report_of(net_(), lambda model, x: steps.loss_of(model(x) - model(x.flip(3))))
    assert [missed.reason for missed in two.not_run] == ["train_step runs no backward"]


def test_held_layers_and_instance_norms() -> None:
    net = net_()
    freeze(net, "1")
    net[4] = nn.InstanceNorm2d(8)
    assert not report_of(net, steps.sam(steps.sgd(net))).findings


def test_a_frozen_affine_does_not_make_a_forward_idle() -> None:
    net = net_()
    net[1].requires_grad_(False)
    assert not report_of(net, steps.accumulating(steps.sgd(net))).findings
