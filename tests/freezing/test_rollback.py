"""All or nothing: whatever raises, wherever, the model is untouched or wholly changed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
from torch import nn

import stillnorm as sn
from support import layers
from support.fingerprint import Fingerprint

freeze_module = importlib.import_module("stillnorm.freezing.freeze")


class Interrupted(BaseException):
    """A Ctrl-C, as far as any code can tell."""


def model() -> nn.Module:
    """Every kind of held class, gradients, hooks, a shared weight, a held and a learning layer."""
    names = ("2d", "own F.batch_norm", "instance2d", "2d", "2d", "2d")
    net = nn.Sequential(*(layers.make(name, seed) for seed, name in enumerate(names, 1)))
    net[3].weight = net[0].weight
    sn.freeze(net, "4")
    sn.freeze(net, "5", affine="trains")
    net.train()
    net[5].register_forward_hook(lambda *args: None)
    net(layers.example("2d").requires_grad_()).sum().backward()
    return net


VERBS: dict[str, Callable[[nn.Module], object]] = {
    "freeze": sn.freeze,
    "freeze strict": lambda net: sn.freeze(net, strict=True),
    "freeze trains": lambda net: sn.freeze(net, affine="trains"),
    "unfreeze": sn.unfreeze,
}


ROOMS = ("freezing", "holding")  # the others only look


def interrupt_at(n: int, call: Callable[[], object]) -> bool:
    """Run `call` and raise at the n-th line of `ROOMS` that it executes; tell whether it did."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if not any(f"stillnorm/{room}/" in frame.f_code.co_filename for room in ROOMS):
            return None
        if event == "line":
            count += 1
            if count == n:
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("verb", VERBS)
def test_an_interrupt_at_any_line(verb: str) -> None:
    """Every single line that a verb executes: afterwards all of it happened, or nothing."""
    act = VERBS[verb]
    net = model()
    before = Fingerprint(net)
    reached_change, n = False, 1
    while interrupt_at(n, lambda: act(net)):
        different = Fingerprint(net).differences(before)
        if different:  # interrupted after the commit, on the way out
            reached_change = True
            break
        n += 1
    assert n > 50  # it was interrupted very often
    if reached_change:
        after = _shape(net)
        act(net)
        assert _shape(net) == after
        for further in range(n, n + 50):
            other = model()
            if not interrupt_at(further, lambda other=other: act(other)):
                return
            assert _shape(other) == after


def _shape(net: nn.Module) -> list[tuple[Any, ...]]:
    """Enough to tell a wholly changed model from one that is half changed."""
    return [
        (type(m), m.training, [(p.requires_grad, p.grad is None) for p in m.parameters()])
        for m in net.modules()
    ]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, Interrupted])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("verb", VERBS)
def test_an_exception_at_every_layer(
    verb: str, when: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after the change of each single layer in turn."""
    primitive = "release" if verb == "unfreeze" else "hold"
    real = getattr(freeze_module, primitive)
    count = 0
    for k in range(20):
        net = model()
        before = Fingerprint(net)
        seen = 0

        def failing(module: nn.Module, *args: Any, k: int = k) -> None:
            nonlocal seen
            seen += 1
            if seen == k + 1 and when == "before":
                raise error("here")
            real(module, *args)
            if seen == k + 1:
                raise error("here")

        monkeypatch.setattr(freeze_module, primitive, failing)
        try:
            VERBS[verb](net)
        except error:
            count += 1
            assert Fingerprint(net).differences(before) == []
        else:
            break
    assert count == {"freeze": 5, "freeze strict": 5, "freeze trains": 5, "unfreeze": 2}[verb]


def test_a_class_that_cannot_be_subclassed_changes_nothing() -> None:
    """The fifth layer's class refuses: the four before it are as they were."""

    class Final(nn.BatchNorm2d):
        def __init_subclass__(cls, **kwargs: object) -> None:
            raise TypeError("Final is final")

    net = nn.Sequential(*(layers.make("2d", seed) for seed in range(4)), layers.settle(Final(4)))
    before = Fingerprint(net)
    with pytest.raises(TypeError, match="final"):
        sn.freeze(net)
    assert Fingerprint(net).differences(before) == []
