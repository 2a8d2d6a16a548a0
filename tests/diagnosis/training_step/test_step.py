"""Running a training step: nothing is left behind, and who gets the optimizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import stillnorm as sn
from diagnosis import steps
from diagnosis.nets import data
from diagnosis.steps import net_, seen
from stillnorm import check
from stillnorm.errors import CallError
from support.fingerprint import Fingerprint

STEPS: dict[str, Callable[[torch.optim.Optimizer], steps.TrainStep]] = {
    "plain": steps.plain,
    "checkpoint": lambda o: steps.checkpointed(o, reentrant=False),
    "reentrant": lambda o: steps.checkpointed(o, reentrant=True),
    "checkpoint_sequential": lambda o: steps.checkpointed_in_parts(o, reentrant=False),
    "accumulating": steps.accumulating,
    "siamese": steps.siamese,
    "SAM": steps.sam,
    "SAM by assignment": lambda o: steps.sam(o, data=True),
    "attack": lambda o: steps.attacking(o, by_backward=True),
    "VAT": steps.virtual_adversarial,
    "validating": steps.validating,
    "gradient penalty": steps.penalised,
}


@pytest.mark.parametrize("given", [True, False], ids=["optimizer=", "unknown optimizer"])
@pytest.mark.parametrize("name", STEPS)
def test_nothing_is_left_behind(name: str, given: bool) -> None:
    net = net_()
    optimizer = torch.optim.AdamW(net.parameters())
    train_step = STEPS[name](optimizer)
    train_step(net, data(16, seed=3))
    loss = steps.loss_of(net(data(8)))  # a graph that is outstanding
    everything = copy.deepcopy(optimizer.state_dict())
    before, states = Fingerprint(net), [id(state) for state in optimizer.state.values()]
    step = seen(net, train_step, optimizer=optimizer if given else None)
    assert step.steps == 1
    assert len(step.trained) == 10
    assert Fingerprint(net).differences(before) == []
    assert [id(state) for state in optimizer.state.values()] == states
    torch.testing.assert_close(optimizer.state_dict(), everything, rtol=0, atol=0)
    loss.backward()


def test_the_batch_is_not_written_to() -> None:
    x = data(16)

    def train_step(model: nn.Module, x: Tensor) -> None:
        x.mul_(2).requires_grad_()

    before = x.clone()
    seen(net_(), train_step, x)
    assert torch.equal(x, before)
    assert not x.requires_grad


@pytest.mark.parametrize(
    "error", [ValueError("no"), KeyboardInterrupt(), sn.errors.StateError("x")]
)
@pytest.mark.parametrize("name", ["plain", "SAM", "reentrant"])
def test_a_step_that_raises_leaves_nothing_behind(name: str, error: BaseException) -> None:
    net = net_()
    optimizer = torch.optim.Adam(net.parameters())
    good = STEPS[name](optimizer)

    def train_step(model: nn.Module, x: Tensor) -> None:
        good(model, x)
        with torch.no_grad():
            model.eval()(x)
            raise error

    before = Fingerprint(net)
    expected = CallError if isinstance(error, Exception) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        check(net, data(16), train_step=train_step, select="SN302")
    if isinstance(error, Exception):
        assert f"train_step raised {type(error).__name__}: " in str(raised.value)
        assert raised.value.__cause__ is error
        assert "help:" in str(raised.value)
    assert Fingerprint(net).differences(before) == []
    assert len(optimizer.state) == 0
    assert torch.is_grad_enabled()
    assert not torch.nn.modules.module._global_forward_hooks
    assert not _global_optimizer_pre_hooks
    assert not _global_optimizer_post_hooks


def test_the_step_runs_only_for_a_rule_that_needs_it() -> None:
    def train_step(model: nn.Module, x: Tensor) -> None:
        raise AssertionError("it ran")

    assert not check(net_(), data(16), train_step=train_step, select="SN002").crashed
    with pytest.raises(CallError, match="it ran"):
        check(net_(), data(16), train_step=train_step, select="SN302")


# ------------------------------------------------------------------ the optimizer argument


def third_named(model: Any, batch: Any, optimizer: Any = None) -> Any:
    return optimizer


def third_of_another_name(model: Any, batch: Any, scaler: Any = None) -> Any:
    return scaler


@pytest.mark.parametrize(
    ("function", "gets_it"),
    [
        (lambda model, batch: None, False),
        (lambda model, batch, optimizer: optimizer, True),
        (lambda model, batch, opt: opt, True),
        (third_named, True),
        (third_of_another_name, False),
        (functools.partial(lambda extra, model, batch, optimizer: optimizer, 1), True),
        (lambda *arguments: arguments[2] if len(arguments) > 2 else None, False),
    ],
)
def test_who_gets_the_optimizer(function: Any, gets_it: bool) -> None:
    net = net_()
    optimizer = steps.sgd(net)
    got: list[object] = []

    @functools.wraps(function)
    def train_step(*arguments: Any) -> None:
        got.append(function(*arguments))

    seen(net, train_step, optimizer=optimizer)
    assert got == [optimizer if gets_it else None]


def test_an_optimizer_that_is_asked_for_and_not_there() -> None:
    with pytest.raises(CallError, match=r"there is no optimizer[\s\S]*optimizer=optimizer"):
        seen(net_(), lambda model, batch, optimizer: None)
