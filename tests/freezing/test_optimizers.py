"""No optimizer moves what is frozen: stale gradients, weight decay, momentum, fused, by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import stillnorm as sn
from support import layers
from support.fingerprint import bits

OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], Optimizer]] = {
    "SGD decay momentum": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, weight_decay=0.1),
    "SGD nesterov": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, nesterov=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, 1e-3, momentum=0.9, weight_decay=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, 1e-3, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.5),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.5, fused=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-3, weight_decay=0.1),
    "Rprop": lambda p: torch.optim.Rprop(p, 1e-3),
}


def norm_tensors(net: nn.Module) -> dict[str, object]:
    return {k: bits(t) for k, t in net.state_dict().items() if k.startswith(("1.", "3.1", "6."))}


def step(net: nn.Module, optimizer: Optimizer, seed: int, set_to_none: bool = True) -> None:
    optimizer.zero_grad(set_to_none=set_to_none)
    net.train()
    net(layers.conv_input(seed=seed)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_warm_optimizer(name: str, set_to_none: bool) -> None:
    """Frozen after some steps: gradients are left over, momentum and moments are warm."""
    net = layers.conv_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    for seed in range(3):
        step(net, optimizer, seed, set_to_none)
    assert net[1].weight.grad is not None
    sn.freeze(net)
    frozen, conv = norm_tensors(net), net[0].weight.clone()
    for seed in range(3):
        step(net, optimizer, seed, set_to_none)
    assert norm_tensors(net) == frozen
    assert not torch.equal(net[0].weight, conv)  # the rest does learn


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stale_gradient_without_another_backward(name: str) -> None:
    """backward, freeze, step: the gradient of before must not arrive."""
    net = layers.conv_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    step(net, optimizer, 0)
    net(layers.conv_input()).square().mean().backward()
    sn.freeze(net)
    frozen = norm_tensors(net)
    optimizer.step()
    assert norm_tensors(net) == frozen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_requires_grad_switched_on_again_by_hand(name: str) -> None:
    """`for p in net.parameters(): p.requires_grad = True`, as GAN loops do."""
    net = layers.conv_net()
    optimizer = OPTIMIZERS[name](net.parameters())
    step(net, optimizer, 0)
    sn.freeze(net)
    frozen = norm_tensors(net)
    net.requires_grad_(True)
    for seed in range(3):
        step(net, optimizer, seed, set_to_none=False)
    assert norm_tensors(net) == frozen
    assert net[1].weight.grad is None


def test_optimizer_keeps_its_parameters() -> None:
    """No orphan in the optimizer, no parameter outside it (timm leaves two of four behind)."""
    net = layers.conv_net()
    optimizer = torch.optim.AdamW(net.parameters())
    step(net, optimizer, 0)
    state = {id(p): value for p, value in optimizer.state.items()}
    sn.freeze(net)
    sn.unfreeze(net)
    sn.freeze(net, affine="trains")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in net.parameters()}
    assert {id(p): value for p, value in optimizer.state.items()} == state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_affine_learns_as_in_eval_mode_and_statistics_stand_still(name: str) -> None:
    """Thread 002: against a twin whose norms are put into eval mode before every step."""
    net, twin = layers.conv_net(), layers.conv_net()
    sn.freeze(net, affine="trains")
    statistics = {k: bits(t) for k, t in net.state_dict().items() if "running" in k or "num_" in k}
    optimizers = [OPTIMIZERS[name](m.parameters()) for m in (net, twin)]
    weight = net[1].weight.clone()
    for seed in range(4):
        step(net, optimizers[0], seed)
        optimizers[1].zero_grad()
        twin.train()
        for layer in (twin[1], twin[3][1], twin[6]):
            layer.eval()
        twin(layers.conv_input(seed=seed)).square().mean().backward()
        optimizers[1].step()
    assert not torch.equal(net[1].weight, weight)
    for key, tensor in twin.state_dict().items():
        assert torch.equal(net.state_dict()[key], tensor), key
    assert {k: bits(net.state_dict()[k]) for k in statistics} == statistics


def test_sam_style_ascent_and_manual_updates_by_gradient() -> None:
    """A second forward and hand-written updates where a gradient exists."""
    net = layers.conv_net()
    sn.freeze(net)
    frozen = norm_tensors(net)
    net.train()
    for seed in range(2):
        net(layers.conv_input(seed=seed)).square().mean().backward()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=0.1)
    assert norm_tensors(net) == frozen


def test_grad_scaler_and_clipping() -> None:
    net = layers.conv_net()
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    scaler = torch.amp.GradScaler("cpu")
    sn.freeze(net)
    frozen = norm_tensors(net)
    for seed in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = net.train()(layers.conv_input(seed=seed)).float().square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert norm_tensors(net) == frozen
