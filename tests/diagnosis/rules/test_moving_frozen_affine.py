"""SN303: fires where an optimizer moves what is frozen, and its fix stops that."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagnosis import steps
from diagnosis.nets import conv_net, data, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis import Report
from support.zoo import torchvision

OPTIMIZERS: dict[str, Any] = {
    "weight decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}


def zeroing(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """A step as before torch 2: gradients are set to zero, not dropped."""
    optimizer.zero_grad(set_to_none=False)
    steps.loss_of(model(x)).backward()
    optimizer.step()


def dropping(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    steps.loss_of(model(x)).backward()
    optimizer.step()


def trained(name: str, net: nn.Module | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = estimated(conv_net()).train() if net is None else net
    optimizer = OPTIMIZERS[name](net.parameters())
    zeroing(net, data(16), optimizer)
    return net, optimizer


def report_of(net: nn.Module, optimizer: Any, step: Any = zeroing) -> Report:
    report = check(net, data(16), train_step=step, optimizer=optimizer, select="SN303")
    assert not report.crashed
    return report


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_frozen_after_some_steps(name: str) -> None:
    net, optimizer = trained(name)
    net[1].requires_grad_(False)
    before = net[1].weight.detach().clone()
    report = report_of(net, optimizer)
    (finding,) = report.findings
    assert finding.severity == "error"
    assert finding.paths == ("1",)
    assert finding.evidence["parameters"] == 2
    assert finding.evidence["largest"] > 0
    assert torch.equal(net[1].weight, before)
    # The fix, and the promise of a safe one: eval as before, and the finding is gone.
    output = net.eval()(data())
    report.fix()
    assert torch.equal(net(data()), output)
    assert not report_of(net.train(), optimizer).findings
    zeroing(net, data(16), optimizer)
    assert torch.equal(net[1].weight, before)


def test_a_resnet() -> None:
    net, optimizer = trained("momentum", torchvision.models.resnet18(num_classes=4))
    net.layer1.requires_grad_(False)
    paths = report_of(net, optimizer).findings[0].paths
    assert sorted(paths) == [f"layer1.{i}.bn{j}" for i in (0, 1) for j in (1, 2)]


def test_the_one_that_moves_most_comes_first() -> None:
    net, optimizer = trained("weight decay")
    net.requires_grad_(False)
    net[8].requires_grad_(True)
    with torch.no_grad():
        net[4].weight.fill_(50)
    finding = report_of(net, optimizer).findings[0]
    assert finding.paths == ("4", "1")
    assert finding.note == "4.weight has a gradient from before"


def test_near_misses() -> None:
    net, optimizer = trained("momentum")
    assert not report_of(net, optimizer).findings  # nothing is frozen
    net[1].requires_grad_(False)
    assert not report_of(net, optimizer, dropping).findings  # torch's default since 2.0
    net[1].zero_grad(set_to_none=True)
    assert not report_of(net, optimizer).findings
    # A gradient of zeros, and nothing that would move a parameter all the same.
    net = estimated(conv_net()).train()
    plain = steps.sgd(net)
    zeroing(net, data(16), plain)
    net[1].requires_grad_(False)
    assert not report_of(net, plain).findings


def test_a_held_layer_does_not_move() -> None:
    net, optimizer = trained("Adam")
    freeze(net, "1")
    assert not report_of(net, optimizer).findings


def test_other_parameters_than_of_norms_are_none_of_it() -> None:
    net, optimizer = trained("momentum")
    net[0].requires_grad_(False)
    assert not report_of(net, optimizer).findings


def test_an_average_of_weights_is_written_by_hand() -> None:
    model = steps.WithTeacher()
    optimizer = torch.optim.SGD(model.student.parameters(), lr=0.1)
    report = report_of(model, optimizer, steps.distilling(model))
    assert not report.findings
    assert not report.not_run


def test_it_needs_the_optimizer() -> None:
    net, optimizer = trained("momentum")
    report = report_of(net, None, lambda model, x: zeroing(model, x, optimizer))
    assert [missed.reason for missed in report.not_run] == ["needs optimizer="]
