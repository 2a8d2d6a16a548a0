"""SN306: fires on a look under no_grad that updates, and not on what never has gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagnosis import steps
from diagnosis.nets import conv_net, data, estimated, found
from stillnorm import check, eval_mode, freeze, no_updates
from support.zoo import torchvision


def of(net: nn.Module, train_step: Any, x: Tensor | None = None, select: str = "SN306") -> Any:
    report = check(net, data(16) if x is None else x, train_step=train_step, select=select)
    return found(report)


def net_() -> nn.Sequential:
    return estimated(conv_net()).train()


def test_validation_after_the_step() -> None:
    net = net_()
    report = check(net, data(16), train_step=steps.validating(steps.sgd(net)), select="SN306")
    (finding,) = report.findings
    assert finding.severity == "error"
    assert finding.paths == ("1", "4")
    assert finding.evidence == {"layers": 2, "updates": 1}
    assert all(line.startswith("steps.py:") for line in finding.where)


def test_pseudo_labels_before_it() -> None:
    net = net_()
    assert of(net, steps.virtual_adversarial(steps.sgd(net))) == {"SN306": ("1", "4")}


def test_inference_mode() -> None:
    net = net_()
    step = steps.plain(steps.sgd(net))

    def train_step(model: nn.Module, x: Tensor) -> None:
        step(model, x)
        with torch.inference_mode():
            model(x)

    assert of(net, train_step) == {"SN306": ("1", "4")}


def test_only_the_layers_that_are_called() -> None:
    net = net_()
    step = steps.plain(steps.sgd(net))

    def train_step(model: nn.Module, x: Tensor) -> None:
        step(model, x)
        with torch.no_grad():
            model[:3](x)

    assert of(net, train_step) == {"SN306": ("1",)}


@pytest.mark.parametrize("quietly", [no_updates, eval_mode])
def test_the_cure(quietly: Any) -> None:
    net = net_()
    assert of(net, steps.validating(steps.sgd(net), quietly)) == {}


def test_a_resnet() -> None:
    net = torchvision.models.resnet18(num_classes=4)
    x = torch.randn(4, 3, 32, 32)
    assert len(of(net, steps.validating(steps.sgd(net)), x)["SN306"]) == 20
    assert of(net, steps.validating(steps.sgd(net), eval_mode), x) == {}


NEAR_MISSES: dict[str, Any] = {
    "plain": steps.plain,
    "checkpoint": lambda o: steps.checkpointed(o, reentrant=False),
    "reentrant checkpoint": lambda o: steps.checkpointed(o, reentrant=True),
    "reentrant checkpoint in parts": lambda o: steps.checkpointed_in_parts(o, reentrant=True),
    "SAM": steps.sam,
    "attack": lambda o: steps.attacking(o, by_backward=True),
    "accumulating": steps.accumulating,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    net = net_()
    assert of(net, NEAR_MISSES[name](steps.sgd(net))) == {}


def test_a_teacher_that_never_has_gradients() -> None:
    model = steps.WithTeacher()
    assert of(model, steps.distilling(model), select="SN306,SN302,SN001,SN303") == {}


def test_a_frozen_backbone_is_another_fault() -> None:
    net = net_()
    net[:3].requires_grad_(False)
    optimizer = steps.sgd(net)

    def train_step(model: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            hidden = model[:3](x)
        optimizer.zero_grad()
        steps.loss_of(model[3:](hidden)).backward()
        optimizer.step()

    assert of(net, train_step, select="SN306,SN001") == {"SN001": ("1",)}


def test_inference_in_train_mode_explains_it() -> None:
    """SN006: the user's own `predict`, called in the step to validate."""
    net = net_()
    step = steps.plain(steps.sgd(net))

    def predict(model: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return model(x)

    def train_step(model: nn.Module, x: Tensor) -> None:
        step(model, x)
        predict(model, x)

    given = {"train_step": train_step, "predict": predict}
    report = check(net, data(16), select="SN006,SN306", **given)
    assert set(found(report)) == {"SN006"}
    assert set(found(check(net, data(16), select="SN306", **given))) == {"SN306"}


def test_layers_that_do_not_update() -> None:
    net = net_()
    freeze(net)
    assert of(net, steps.validating(steps.sgd(net))) == {}
    assert of(net_().eval(), steps.validating(steps.sgd(net))) == {}
