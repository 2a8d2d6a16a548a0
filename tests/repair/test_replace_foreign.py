"""Replacing the frozen layers of other libraries, and being replaced by them."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import stillnorm as sn
from repair.replacing import (
    FOREIGN,
    FrozenBatchNorm2d,
    act_net,
    around,
    exact,
    foreign,
    formula,
)
from stillnorm.errors import StateError
from stillnorm.repair import replace
from support import layers, oracles
from support.fingerprint import Fingerprint, bits
from support.layers import conv_input, conv_net, settle
from support.zoo import timm

# ------------------------------------------------------------------ foreign frozen layers


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_frozen_layer_becomes_a_held_batch_norm(name: str) -> None:
    layer, eps = foreign(name)
    net, x = around(layer).train(), layers.example("2d")
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    want = oracles.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps
    )
    want = F.silu(want) if name == "timm" else want
    before = Fingerprint(net)
    report = replace(net, "batch")
    new = net[0]
    assert report.replaced[0].lost == ""
    assert isinstance(new, timm.layers.BatchNormAct2d if name == "timm" else nn.BatchNorm2d)
    assert new.eps == eps
    assert int(new.num_batches_tracked) == 0
    assert sn.is_frozen(net)
    for mode in (True, False):
        y = net.train(mode)(x)
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    own = new.state_dict()
    assert all(torch.equal(own[key], value) for key, value in state.items())
    pointers = {t.data_ptr() for t in layer.buffers()}
    assert not pointers & {t.data_ptr() for t in (*new.parameters(), *new.buffers())}
    net.load_state_dict({f"0.{k}": v for k, v in state.items()}, strict=True)
    net.train()
    sn.unfreeze(net)
    assert net[0].training
    assert net[0].weight.requires_grad
    report.undo()
    assert not Fingerprint(net).differences(before)


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_frozen_layers_become_affine_but_not_sync(name: str) -> None:
    layer, eps = foreign(name)
    net, x = around(layer), layers.example("2d")
    assert '"batch" first' in replace(net, "sync").refused[0][1]
    assert replace(net, "frozen").already == ("0",)
    assert "two-dimensional" in replace(net, "batch1d").refused[0][1]
    want = oracles.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps
    )
    replace(net, "affine")
    want = F.silu(want) if name == "timm" else want
    torch.testing.assert_close(net(x).double(), want, rtol=1e-5, atol=1e-5)
    assert not net[0].scale.requires_grad


def test_a_held_batch_norm_in_place_of_theirs_keeps_half_precision() -> None:
    """torchvision's promotes a half input to the dtype of its buffers; batch norm does not."""
    layer, _ = foreign("torchvision")
    net, x = around(layer), layers.example("2d").half()
    assert net(x).dtype == torch.float32
    want = net(x).half()
    replace(net, "batch")
    torch.testing.assert_close(net(x), want, rtol=2e-3, atol=2e-3)


def test_a_forward_that_does_more_raises_and_changes_nothing() -> None:
    class FrozenBatchNormPlus(FrozenBatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    net = nn.Sequential(layers.make("2d"), FrozenBatchNormPlus(4), layers.make("2d"))
    before = Fingerprint(net)
    with pytest.raises(StateError, match="1: BatchNorm2d in its place computes something else"):
        replace(net, "batch")
    with pytest.raises(StateError, match="1: AffineNorm"):
        replace(net, "affine")
    assert not Fingerprint(net).differences(before)


# ------------------------------------------------------------------ frozen, and back


def test_frozen_and_back_lose_nothing() -> None:
    """What timm's round trip loses: momentum, counts, flags, hooks, requires_grad, activations."""
    net, x = act_net().train(), conv_input()
    net[3].weight.requires_grad_(False)
    net[1].register_forward_hook(lambda *_: None)
    old, want = list(net), exact(net, x)
    net.train()
    tensors = [net[i].state_dict(keep_vars=True) for i in (1, 3)]
    report = replace(net, "frozen")
    assert "weight and bias as parameters" in report.replaced[0].lost
    assert [type(net[i]).__name__ for i in (1, 3)] == ["FrozenBatchNormAct2d", "FrozenBatchNorm2d"]
    assert (net[1].eps, net[3].eps) == (0.01, 0.1)
    torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)
    back = replace(net, "batch")
    assert all(one.lost == "" for one in back.replaced)
    assert torch.equal(net.train()(x), want)
    sn.unfreeze(net)
    for new, was, before in zip((net[1], net[3]), (old[1], old[3]), tensors, strict=True):
        assert type(new) is type(was)
        assert new is not was
        now = new.state_dict(keep_vars=True)
        assert all(now[key] is tensor for key, tensor in before.items())
        assert new.momentum == was.momentum
        assert new.training
    assert net[1]._forward_hooks
    assert not net[3].weight.requires_grad
    assert net[3].bias.requires_grad


def test_both_undone_in_turn() -> None:
    net = act_net().train()
    before = Fingerprint(net)
    there = replace(net, "frozen")
    between = Fingerprint(net)
    back = replace(net, "batch")
    back.undo()
    assert not Fingerprint(net).differences(between)
    there.undo()
    assert not Fingerprint(net).differences(before)


def test_what_was_loaded_into_the_frozen_layers_comes_back() -> None:
    """In new parameters; the old ones keep their values."""
    net, other, x = act_net(), act_net(), conv_input()
    settle(other, 9)
    net[0].load_state_dict(other[0].state_dict())
    net[2].load_state_dict(other[2].state_dict())
    want, old = exact(other, x), net[3].weight
    kept = bits(old)
    replace(net, "frozen")
    net.load_state_dict(other.state_dict())
    replace(net, "batch")
    assert torch.equal(exact(net, x), want)
    assert net[3].weight is not old
    assert bits(old) == kept


def test_a_frozen_layer_shares_no_memory_with_what_an_optimizer_moves() -> None:
    net, x = act_net(), conv_input()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    net.train()(x).sum().backward()
    optimizer.step()
    replace(net, "frozen")
    before = {k: v.clone() for k, v in net[3].state_dict().items()}
    optimizer.step()  # stale gradients move the old parameters
    assert all(torch.equal(v, before[k]) for k, v in net[3].state_dict().items())


def test_frozen_of_every_layer_or_a_reason() -> None:
    """Peers skip BatchNorm1d and 3d in silence, and crash without affine or statistics."""
    net = nn.ModuleDict(
        {
            "1d": layers.make("1d"),
            "3d": layers.make("3d"),
            "bare": layers.make("affine=False"),
            "untracked": nn.BatchNorm2d(4, track_running_stats=False),
        }
    )
    bare, x = net["bare"], layers.example("2d")
    report = replace(net, "frozen")
    assert [one.path for one in report.replaced] == ["bare"]
    reasons = dict(report.refused)
    assert "two-dimensional" in reasons["1d"] == reasons["3d"]
    assert "no running statistics" in reasons["untracked"]
    torch.testing.assert_close(net["bare"](x).double(), formula(bare, x), rtol=1e-5, atol=1e-5)
    replace(net, "batch", "bare")
    assert net["bare"].weight is None


def test_frozen_without_torchvision_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torchvision.ops")
    assert "import torchvision first" in replace(conv_net(), "frozen").refused[0][1]


def test_a_sync_layer_goes_to_frozen_and_back_to_what_it_was() -> None:
    net, x = act_net(), conv_input()
    want, kinds = exact(net, x), [type(m) for m in net]
    for kind in ("sync", "frozen", "batch"):
        replace(net, kind)
    assert torch.equal(exact(net, x), want)
    sn.unfreeze(net)
    assert [type(m) for m in net] == kinds


# ------------------------------------------------------------------ sequences


@settings(max_examples=40)
@given(
    kinds=st.lists(st.sampled_from(["sync", "batch", "frozen", "freeze", "unfreeze"]), max_size=6),
    last=st.sampled_from(["affine", None]),
    training=st.booleans(),
)
def test_any_sequence_keeps_the_function_and_can_be_undone(
    kinds: list[str], last: str | None, training: bool
) -> None:
    net, x = act_net().train(training), conv_input(2)
    want = exact(copy.deepcopy(net), x)
    stack: list[tuple[Fingerprint, Any]] = []
    for kind in [*kinds, *([last] if last else [])]:
        if kind in ("freeze", "unfreeze"):
            getattr(sn, kind)(net)
            stack.clear()
            continue
        stack.append((Fingerprint(net), replace(net, kind)))
        torch.testing.assert_close(exact(copy.deepcopy(net), x), want, rtol=1e-4, atol=1e-4)
        for norm in (net[1], net[3]):
            assert norm.eps in (0.01, 0.1)
    while stack:
        before, report = stack.pop()
        report.undo()
        assert not Fingerprint(net).differences(before)
