"""probe_modes: what train() and eval() would do, and not a trace that anyone asked."""

from __future__ import annotations

import collections
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import stillnorm as sn
from stillnorm.norms import find_norms, probe_modes
from support import layers
from support.fingerprint import Fingerprint
from support.zoo import timm, torchvision


class NormEval(nn.Module):
    """mmdetection's way: a backbone whose train() puts its norms back into eval."""

    def __init__(self, norm_eval: bool = True) -> None:
        super().__init__()
        self.norm_eval = norm_eval
        self.body = layers.conv_net()

    def train(self, mode: bool = True) -> NormEval:
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


class FreezeFlags(nn.Module):
    """Thread 001's: an overridden train() with a flag, on a network with a part left live."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(layers.make("2d"))
        self.head = nn.Sequential(layers.make("2d"))
        self.freeze_bn = True

    def train(self, mode: bool = True) -> FreezeFlags:
        super().train(mode)
        if self.freeze_bn:
            self.backbone.eval()
        return self


class Meddler(nn.Module):
    """A train() that does everything one should not do there."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = layers.make("2d")
        self.conv = nn.Conv2d(4, 4, 1)
        self.register_buffer("calls", torch.zeros(()))
        self.log: list[bool] = []
        self.counts: dict[str, Any] = {"by mode": collections.Counter(), "nested": [[0]]}
        self.seen = {1}
        self.hidden = [nn.Dropout(), (nn.Sequential(nn.BatchNorm2d(2)),)]
        object.__setattr__(self, "friend", nn.Dropout())
        self.fused = False
        self.doomed = 1

    def train(self, mode: bool = True) -> Meddler:
        super().train(mode)
        print("switching to", mode)
        self.log.append(mode)
        self.counts["by mode"][mode] += 1
        self.counts["nested"][0][0] += 1
        self.counts["new"] = mode
        self.seen.add(len(self.log))
        self.calls += 1
        for module in (self.hidden[0], self.hidden[1][0], self.friend):
            module.train(mode)
        torch.rand(3), random.random(), np.random.rand()
        if self.fused is mode:  # a LoRA layer's merge: in place, not exactly invertible
            factor = 1.1 if mode else 1 / 1.1
            self.conv.weight.data.mul_(factor)
            self.conv.weight.data = self.conv.weight.data + 0.1
            with torch.no_grad():
                self.bn.running_mean.add_(1e-3)
                self.bn.weight.mul_(factor)
            self.conv.bias.requires_grad_(mode)
            self.conv.weight.grad = None
            self.bn.momentum = 0.7
            self.fused = not mode
        self.extra = object()
        self.bn.register_forward_hook(lambda *args: None)
        self.log = [*self.log]
        self.add_module("late", nn.ReLU())
        self.__dict__.pop("doomed", None)
        return self


class Loud(nn.Module):
    """Below it there is no norm: its train() cannot matter and must not be called."""

    def train(self, mode: bool = True) -> Loud:
        raise AssertionError("called")


class OwnEval(nn.Module):
    """An eval() of its own that does not reach the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = layers.make("2d")

    def eval(self) -> OwnEval:
        self.training = False
        return self


def held_in_part() -> nn.Module:
    net = layers.conv_net()
    sn.freeze(net, "3")
    return net


def instance_train() -> nn.Module:
    """The other idiom: `layer.train = lambda mode: layer` on the instance."""
    net = layers.conv_net().eval()
    net[1].train = lambda mode=True: net[1]
    return net


def scripted_child() -> nn.Module:
    net = NormEval()
    net.scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(2)))
    return net


def shared_below_a_second_parent() -> nn.Module:
    """Only the second of the two parents overrides train()."""
    parent = FreezeFlags()
    return nn.ModuleList([nn.Sequential(parent.backbone[0]), parent])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": layers.conv_net,
    "held in part": held_in_part,
    "norm_eval": NormEval,
    "norm_eval off": lambda: NormEval(norm_eval=False),
    "norm_eval inside": lambda: nn.Sequential(NormEval(), layers.make("2d")),
    "freeze flags": FreezeFlags,
    "sticky layer": lambda: nn.Sequential(layers.settle(layers.StickyNorm(4)), nn.ReLU()),
    "counting layer": lambda: nn.Sequential(layers.make("own train()")),
    "held counting layer": lambda: _frozen(nn.Sequential(layers.make("own train()"))),
    "instance attribute": instance_train,
    "own eval()": OwnEval,
    "scripted child": scripted_child,
    "shared": shared_below_a_second_parent,
    "timm levit": lambda: timm.create_model("levit_128s", num_classes=2),
    "torchvision": lambda: torchvision.models.resnet18(num_classes=2),
}


def _frozen(net: nn.Module) -> nn.Module:
    sn.freeze(net)
    return net


@pytest.mark.parametrize("start", ["as built", "train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_says_what_the_calls_do_and_leaves_the_model_as_found(name: str, start: str) -> None:
    """Against really calling train() and eval() on the very same kind of model."""
    net = MODELS[name]()
    if start != "as built":
        getattr(net, start)()
    modules = list(net.modules())
    flags = [module.training for module in modules]  # TorchScript keeps them out of sight
    before = Fingerprint(net)
    modes = probe_modes(net)
    assert Fingerprint(net).differences(before) == []
    assert [module.training for module in modules] == flags
    net.train()
    assert [modes.in_train[m] for m in modules] == [m.training for m in modules]
    net.eval()
    assert [modes.in_eval[m] for m in modules] == [m.training for m in modules]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_meddling_train_leaves_no_trace(
    wrapped: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prints, counters, nested containers, hooks, merged weights, random numbers, all of it."""
    meddler = Meddler()
    net = nn.Sequential(meddler, Loud()) if wrapped else meddler
    meddler.conv.weight.grad = torch.ones_like(meddler.conv.weight)
    y = meddler.bn.eval()(torch.randn(2, 4, 3, 3, requires_grad=True))  # an outstanding graph
    hidden = [meddler.hidden[0], meddler.hidden[1][0][0], meddler.friend]
    everything = nn.ModuleList([net, *hidden])
    for module in everything.modules():
        module.training = True
    states = random.getstate(), np.random.get_state()[1].tolist()
    before = Fingerprint(everything)
    capsys.readouterr()
    probe_modes(net)
    assert capsys.readouterr().out == ""
    assert Fingerprint(everything).differences(before) == []
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    y.sum().backward()  # the version counters are back too


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [1, 2])
def test_a_train_that_raises_leaves_no_trace(error: type[BaseException], at: int) -> None:
    class Raising(Meddler):
        def train(self, mode: bool = True) -> Raising:
            super().train(mode)
            if len(self.log) == at:
                raise error("in train()")
            return self

    net = nn.ModuleList([Raising()])
    before = Fingerprint(net)
    with pytest.raises(error, match="in train"):
        probe_modes(net)
    assert Fingerprint(net).differences(before) == []


def test_no_override_no_call() -> None:
    """torch's own layers are answered without setting a single flag."""
    called = []

    class Child(nn.Module):
        @property
        def training(self) -> bool:
            return True

        @training.setter
        def training(self, mode: bool) -> None:
            called.append(mode)

    net = nn.Sequential(layers.conv_net(), Child())
    called.clear()
    modes = probe_modes(net)
    assert all(modes.in_train.values())
    assert not any(modes.in_eval.values())
    assert called == []


def test_modules_added_below_by_train_are_gone() -> None:
    net = Meddler()
    probe_modes(net)
    assert "late" not in net._modules
    assert net.doomed == 1


# ------------------------------------------------------------------------------- by what


@pytest.mark.parametrize(
    ("name", "path", "by"),
    [
        ("plain", "1", None),
        ("held in part", "3.1", "stillnorm"),
        ("held in part", "1", None),
        ("norm_eval", "body.1", "NormEval.train()"),
        ("norm_eval off", "body.1", None),
        ("norm_eval inside", "0.body.1", "NormEval.train()"),
        ("norm_eval inside", "1", None),
        ("freeze flags", "backbone.0", "FreezeFlags.train()"),
        ("freeze flags", "head.0", None),
        ("sticky layer", "0", "StickyNorm.train()"),
        ("counting layer", "0", None),
        ("held counting layer", "0", "stillnorm"),
        ("instance attribute", "1", "BatchNorm2d.train()"),
        ("shared", "0.0", "FreezeFlags.train()"),
    ],
)
def test_names_what_holds_a_layer(name: str, path: str, by: str | None) -> None:
    net = MODELS[name]()
    modes = probe_modes(net)
    (norm,) = [norm for norm in find_norms(net) if path in norm.paths]
    assert modes.held_by(norm) == by


def test_names_another_librarys_layer() -> None:
    net = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(4))
    (norm,) = find_norms(net)
    assert probe_modes(net).held_by(norm) == "torchvision FrozenBatchNorm2d"


def test_a_layer_without_statistics_is_held_by_nothing() -> None:
    """It is in eval after train(), and still normalises by the batch."""

    class Off(NormEval):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))

    net = Off()
    (norm,) = find_norms(net)
    assert probe_modes(net).held_by(norm) is None


def test_logging_still_works_inside(caplog: pytest.LogCaptureFixture) -> None:
    """Only what is printed is swallowed: warnings and logs are the user's own affair."""

    class Logs(NormEval):
        def train(self, mode: bool = True) -> Logs:
            logging.getLogger("user").warning("train(%s)", mode)
            super().train(mode)
            return self

    probe_modes(Logs())
    assert [record.message for record in caplog.records] == ["train(True)", "train(False)"]
