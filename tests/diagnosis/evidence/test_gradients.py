"""What some parameters feed, as autograd sees it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net
from stillnorm.diagnosis.evidence.gradients import fed_by
from stillnorm.diagnosis.evidence.request import Request
from stillnorm.diagnosis.evidence.runs import run_flows


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.join = (
            nn.Conv2d(3, 3, 1),
            nn.Conv2d(3, 3, 1),
            nn.Conv2d(3, 2, 1),
        )
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.left(x) + self.norm(self.right(x)))


def run(net: nn.Module, parameters: list[nn.Parameter], **how: object) -> set[nn.Module] | None:
    runs = run_flows(Request(net, batches(), **how), 1)
    got = fed_by(net, runs, parameters)
    return None if got is None else set(got)


def test_parallel_branches_do_not_feed_each_other() -> None:
    net = Branches()
    assert run(net, list(net.left.parameters())) == {net.join}
    assert run(net, list(net.right.parameters())) == {net.norm, net.join}


def test_a_forward_without_gradients_shows_nothing() -> None:
    net = conv_net()
    parameters = list(net[0].parameters())
    assert run(net, parameters) is not None
    assert run(net, parameters, forward=lambda net, x: torch.no_grad()(net)(x)) is None


def test_nothing_is_kept_for_backward_and_nothing_is_changed() -> None:
    net = conv_net()
    net[0].requires_grad_(False)
    kept = []

    def look(module: nn.Module, args: object, out: Tensor) -> None:
        if out.grad_fn is not None:
            kept.append(out.grad_fn._saved_result.numel())

    net[2].register_forward_hook(look)
    run(net, list(net.parameters()))
    assert kept == [0]
    assert [p.requires_grad for p in net[0].parameters()] == [False, False]
    assert all(p.grad is None for p in net.parameters())
