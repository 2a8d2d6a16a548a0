"""After unfreeze the model is as if freeze had never been called."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import stillnorm as sn
from support import layers
from support.fingerprint import Fingerprint
from support.layers import CASES
from support.zoo import torchvision


@pytest.mark.parametrize("affine", ["frozen", "trains"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_to_the_last_byte(name: str, training: bool, affine: str) -> None:
    """Class, identity, hooks, momentum, flags, requires_grad, tensors, order of attributes."""
    net = nn.Sequential(layers.make(name), nn.Dropout()).train(training)
    calls = []
    net[0].register_forward_hook(lambda *args: calls.append("forward"))
    net[0].register_full_backward_hook(lambda *args: calls.append("backward"))
    before = Fingerprint(net)
    sn.freeze(net, affine=affine)  # type: ignore[arg-type]
    net(layers.example(name).requires_grad_()).sum().backward()
    assert calls == ["forward", "backward"]  # hooks fire while held
    net.zero_grad()
    report = sn.unfreeze(net)
    assert report.unfrozen == ("0",)
    different = Fingerprint(net).differences(before)
    assert [where for where in different if "random state" not in where] == []


CALL = st.tuples(st.sampled_from(["train", "eval"]), st.sampled_from(["", "0", "1", "1.0"]))


@given(start=st.lists(CALL, max_size=4), since=st.lists(CALL, max_size=6), again=st.booleans())
def test_the_mode_is_what_the_calls_would_have_given(
    start: list[tuple[str, str]], since: list[tuple[str, str]], again: bool
) -> None:
    """Against a twin that was never frozen, whatever train() and eval() on whatever module."""

    def build() -> nn.Module:
        return layers.settle(
            nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))
        )

    def call(net: nn.Module, calls: list[tuple[str, str]]) -> None:
        for verb, path in calls:
            getattr(net.get_submodule(path), verb)()

    net, twin = build(), build()
    for model in (net, twin):
        call(model, start)
    sn.freeze(net)
    for model in (net, twin):
        call(model, since)
    sn.unfreeze(net)
    if again:
        sn.freeze(net)
        sn.unfreeze(net)
    assert [m.training for m in net.modules()] == [m.training for m in twin.modules()]


def test_tensors_keep_their_present_values() -> None:
    net = layers.conv_net()
    sn.freeze(net, affine="trains")
    weights = [net[1].weight, net[1].running_mean]
    with torch.no_grad():
        for tensor in weights:
            tensor.add_(1)
    present = [t.clone() for t in weights]
    sn.unfreeze(net)
    assert all(torch.equal(a, b) for a, b in zip(weights, present, strict=True))
    assert net[1].weight is weights[0]


def test_it_trains_again_as_a_plain_layer() -> None:
    torch.manual_seed(0)
    net, twin = layers.conv_net().train(), layers.conv_net().train()
    sn.freeze(net)
    net(layers.conv_input())
    sn.unfreeze(net)
    for model in (net, twin):
        model(layers.conv_input()).square().sum().backward()
    for (key, a), b in zip(
        net.state_dict(keep_vars=True).items(),
        twin.state_dict(keep_vars=True).values(),
        strict=True,
    ):
        assert torch.equal(a, b), key
        assert (a.grad is None) == (b.grad is None), key
        assert a.grad is None or torch.equal(a.grad, b.grad), key


def test_what_stillnorm_did_not_hold_is_said() -> None:
    net = nn.Sequential(
        layers.make("2d"),
        layers.make("2d"),
        torchvision.ops.FrozenBatchNorm2d(4),
        nn.GroupNorm(2, 4),
    )
    sn.freeze(net, "0")
    report = sn.unfreeze(net)
    assert report.unfrozen == ("0",)
    assert report.not_held == ("1",)
    assert [path for path, _ in report.refused] == ["2"]
    assert "torchvision" in report.refused[0][1]


def test_refused_when_something_changed_the_class_since() -> None:
    """A parametrisation made a class of its own from the held one."""
    net = layers.conv_net()
    sn.freeze(net)
    parametrize.register_parametrization(net[1], "weight", nn.Identity())
    before = Fingerprint(net[1])
    report = sn.unfreeze(net)
    assert report.unfrozen == ("3.1", "6")
    assert "ParametrizedHeldBatchNorm2d" in dict(report.refused)["1"]
    assert Fingerprint(net[1]).differences(before) == []
    assert sn.is_frozen(net, "1")
    parametrize.remove_parametrizations(net[1], "weight")
    assert sn.unfreeze(net).unfrozen == ("1",)
    assert type(net[1]) is nn.BatchNorm2d


def test_part_of_what_is_frozen() -> None:
    net = layers.conv_net()
    sn.freeze(net)
    assert sn.unfreeze(net, "3").unfrozen == ("3.1",)
    assert [sn.is_frozen(net, path) for path in ("1", "3.1", "6")] == [True, False, True]
