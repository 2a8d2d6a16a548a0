"""SN311: fires on per-sample input gradients through batch statistics only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagnosis import steps
from diagnosis.nets import conv_net, data, estimated
from stillnorm import check, freeze
from stillnorm.repair import replace


def paths(net: nn.Module, train_step: Any, x: Any = None) -> list[tuple[str, ...]]:
    x = data(16) if x is None else x
    report = check(net, x, train_step=train_step, select="SN311")
    assert not report.crashed
    return [finding.paths for finding in report.findings]


def net_() -> nn.Sequential:
    return estimated(conv_net()).train()


def test_a_critic_with_batch_norm() -> None:
    net = net_()
    assert paths(net, steps.penalised(steps.sgd(net))) == [("1", "4")]


def test_the_coupling_is_real() -> None:
    """The gradient of the sum is not that of the sample alone."""
    net = net_()
    x = data(16).requires_grad_()

    def of_mates(net: nn.Module) -> Tensor:
        return torch.autograd.grad(net(x)[0].sum(), x)[0][1:].abs().max()

    assert of_mates(net) > 1e-4
    assert of_mates(net.eval()) == 0


def test_r1_on_the_input_itself_and_derivatives_by_coordinates() -> None:
    def train_step(model: nn.Module, x: Tensor) -> None:
        x.requires_grad_()
        u = model(x)
        (du,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
        (ddu,) = torch.autograd.grad(du[:, 0].sum(), x, create_graph=True)
        ddu.square().mean().backward()

    net = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1))
    assert paths(net, train_step, torch.randn(64, 2)) == [("1",)]


def test_interpolated_samples() -> None:
    """WGAN-GP as written: between real and fake ones, which depend on parameters."""

    def train_step(model: nn.Module, x: Tensor) -> None:
        fake = model[0](x)[:, :3]
        between = 0.5 * x + 0.5 * fake
        (grad,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
        (grad.flatten(1).norm(dim=1) - 1).square().mean().backward()

    assert paths(net_(), train_step) == [("1", "4")]


@pytest.mark.parametrize("train_step", steps.uncoupled(), ids=lambda step: step.__name__)
def test_what_is_no_penalty(train_step: Any) -> None:
    assert paths(net_(), train_step) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda net: freeze(net),
        lambda net: replace(net, "group"),
        lambda net: replace(net, "layer"),
        lambda net: net.eval(),
    ],
    ids=["held", "group norm", "layer norm", "eval"],
)
def test_what_does_not_couple(change: Any) -> None:
    net = net_()
    change(net)
    assert paths(net, steps.penalised(steps.sgd(net))) == []


def test_instance_norms() -> None:
    net = conv_net()
    net[1], net[4] = nn.InstanceNorm2d(8), nn.InstanceNorm2d(8)
    assert paths(net, steps.penalised(steps.sgd(net))) == []


def test_it_is_in_preview() -> None:
    net = net_()
    step = steps.penalised(steps.sgd(net))
    assert not check(net, data(16), train_step=step, select="SN3").findings
