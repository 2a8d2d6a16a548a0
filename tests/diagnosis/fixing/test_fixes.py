"""Fixes are applied all or not at all, and can be taken back."""

from __future__ import annotations

import copy
import warnings
from typing import get_args

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check, freeze, is_frozen, snapshot
from stillnorm.diagnosis.finding import Action
from stillnorm.diagnosis.fixing import fixes
from stillnorm.errors import StateError


def ill() -> nn.Sequential:
    """One of each: stale statistics, Keras's momentum, an eval that nobody holds.

    The last one's weight and bias are frozen, with the gradients of a step before still there.
    """
    net = estimated(conv_net()).train()
    net[4].momentum = 0.99
    net[4].running_mean += 3
    net[1].eval()
    net(data()).sum().backward()
    net[1].requires_grad_(False)
    net[4].running_mean += 3
    return net


class State:
    """Everything that a fix may change."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.tensors = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        self.rest = self.flags()

        self.gradients = [(p, p.grad) for p in net.parameters()]

    def flags(self) -> list[tuple[object, ...]]:
        return [
            (type(m), m.training, m.momentum, m.weight.requires_grad)
            for m in (self.net[1], self.net[4])
        ]

    def same(self) -> bool:
        now = self.net.state_dict()
        tensors = all(torch.equal(now[name], tensor) for name, tensor in self.tensors.items())
        return tensors and self.flags() == self.rest

    def same_gradients(self) -> bool:
        return all(p.grad is grad for p, grad in self.gradients)


def test_every_action_can_be_done() -> None:
    assert set(get_args(Action)) == set(fixes._ACTIONS)


def test_safe_ones_alone_by_default() -> None:
    net = ill()
    applied = check(net, batches()).fix()
    assert [code for code, _ in applied.fixes] == ["SN003"]
    assert is_frozen(net, "1")
    assert net[4].momentum == 0.99


def test_unsafe_ones_too_when_asked_and_then_nothing_is_left() -> None:
    net = ill()
    applied = check(net, batches()).fix(unsafe=True)
    assert [code for code, _ in applied.fixes] == ["SN105", "SN003", "SN108", "SN204"]
    assert found(check(net, batches())) == {}


def test_undo_takes_everything_back() -> None:
    net = ill()
    before, shot = State(net), snapshot(net)
    check(net, batches()).fix(unsafe=True).undo()
    assert before.same()
    assert not shot.diff(net).changes


@pytest.mark.parametrize("step", ["recalibrate", "momentum", "freeze"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [False, True])
def test_an_exception_at_any_step_leaves_the_model_as_it_was(
    step: str, error: type[BaseException], after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = ill()
    report = check(net, batches())
    real = fixes._ACTIONS[step]

    def interrupted(*args: object) -> None:
        if after:
            real(*args)
        raise error

    before = State(net)
    monkeypatch.setitem(fixes._ACTIONS, step, interrupted)
    with pytest.raises(error):
        report.fix(unsafe=True)
    assert before.same()
    assert before.same_gradients()


def test_statistics_come_before_holds() -> None:
    """A layer that is both stale and loose is estimated first and held then."""
    net = estimated(conv_net()).train()
    net[1].eval()
    net[1].running_mean += 3
    report = check(net, batches())
    assert found(report).keys() == {"SN003", "SN105"}
    report.fix(unsafe=True)
    assert is_frozen(net, "1")
    assert found(check(net, batches())) == {}


def test_a_held_layer_with_broken_statistics_is_estimated_and_held_as_before() -> None:
    net = estimated(conv_net())
    freeze(net, affine="trains")
    net[4].running_var[2] = torch.inf
    before = State(net)
    applied = check(net, batches()).fix(unsafe=True)
    assert found(check(net, batches())) == {}
    assert is_frozen(net)
    assert net[4].hold if hasattr(net[4], "hold") else net[4].weight.requires_grad
    applied.undo()
    assert torch.equal(net[1].running_var, before.tensors["1.running_var"])
    assert net[4].running_var[2] == torch.inf
    assert is_frozen(net)


def test_a_layer_that_is_gone_is_an_error_and_nothing_changes() -> None:
    net = ill()
    report = check(net, batches())
    net[1] = nn.Identity()
    with pytest.raises(StateError, match="no norm layer '1' any more"):
        report.fix(unsafe=True)
    assert net[4].momentum == 0.99


def test_no_fix_is_nothing_done() -> None:
    net = conv_net()
    net[0].bias = net[3].bias = None
    estimated(net)
    before = State(net)
    applied = check(net, batches()).fix(unsafe=True)
    applied.undo()
    assert applied.fixes == ()
    assert before.same()


def test_a_layer_that_its_own_train_holds_gets_no_fix_that_would_not_work() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.net[1].eval()
            return self

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    model = Stubborn()
    estimated(model)
    model.net[1].running_mean[0] = torch.nan
    report = check(model.train(), batches(), select="SN102")
    assert found(report) == {"SN102": ("net.1",)}
    assert report.findings[0].fix is None


def test_copies_are_not_touched() -> None:
    net = ill()
    twin = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(net, batches()).fix(unsafe=True)
    assert twin[4].momentum == 0.99
    assert not is_frozen(twin, "1")
