"""is_frozen: what would happen after train(), not what the flags say now."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import stillnorm as sn
from support import layers
from support.fingerprint import Fingerprint
from support.layers import CASES
from support.zoo import torchvision, transformers


def moves(layer: nn.Module, x: torch.Tensor) -> bool:
    """The definition, carried out: after train(), does the batch or an update show?"""
    layer = copy.deepcopy(layer).train()
    layer.train()
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    together, alone = layer(x), [layer(x[i : i + 1]) for i in range(len(x))]
    batch = not torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-4)
    after = layer.state_dict()
    return batch or any(not torch.equal(before[key], after[key]) for key in before)


LAYERS = {name: (lambda name=name: layers.make(name)) for name in CASES if name != "1d-flat"} | {
    "sticky": lambda: layers.settle(layers.StickyNorm(4)),
    "momentum 0": lambda: layers.settle(nn.BatchNorm2d(4, momentum=0.0)),
    "no tracking": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "torchvision's": lambda: torchvision.ops.FrozenBatchNorm2d(4),
    "transformers'": lambda: transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d(4),
}


@pytest.mark.parametrize("how", ["", "eval()", "requires_grad", "frozen", "trains", "unfrozen"])
@pytest.mark.parametrize("name", LAYERS)
def test_agrees_with_what_really_happens(name: str, how: str) -> None:
    net = nn.Sequential(LAYERS[name]())
    if how == "eval()":
        net.eval()
    elif how == "requires_grad":
        net.requires_grad_(False)
    elif how:
        sn.freeze(net, affine="trains" if how == "trains" else "frozen")
        if how == "unfrozen":
            sn.unfreeze(net)
    shape = CASES[name].shape if name in CASES else (3, 4, 5, 6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).abs() * 3
    assert sn.is_frozen(net) is not moves(net, x)


def test_eval_is_not_frozen_and_momentum_0_is_not_frozen() -> None:
    """What threads 000 and 001 took for frozen."""
    net = layers.conv_net().eval()
    assert not sn.is_frozen(net)
    for layer in (net[1], net[3][1], net[6]):
        layer.momentum = 0
        layer.requires_grad_(False)
    assert not sn.is_frozen(net)


def test_only_looks() -> None:
    net = nn.Sequential(layers.make("own train()"), layers.settle(layers.StickyNorm(4)))
    sn.freeze(net, "0")
    before = Fingerprint(net)
    sn.is_frozen(net)
    assert Fingerprint(net).differences(before) == []


def test_sync_conversion_undoes_a_hold_and_is_seen() -> None:
    net = layers.conv_net()
    sn.freeze(net)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert not sn.is_frozen(net)
    assert sn.freeze(net).frozen == ("1", "3.1", "6")
    assert sn.is_frozen(net)


def test_scripting_undoes_a_hold_and_is_seen() -> None:
    net = layers.conv_net()
    sn.freeze(net)
    scripted = torch.jit.script(net)
    assert not sn.is_frozen(scripted)
    scripted.train()
    norm = dict(scripted.named_modules())["1"]
    before = norm.running_mean.clone()
    scripted(layers.conv_input())
    assert not torch.equal(norm.running_mean, before)  # it did thaw
    assert sn.is_frozen(net)


def test_a_scripted_foreign_layer_is_frozen_still() -> None:
    """Nothing in it depends on a mode."""
    scripted = torch.jit.script(nn.Sequential(torchvision.ops.FrozenBatchNorm2d(4)))
    assert sn.is_frozen(scripted)
