"""Real architectures: which norms fold, ten training steps, and back; for inference, too."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import stillnorm as sn
from freezing.test_zoo import quiet
from support import zoo
from support.fingerprint import Fingerprint


@cache
def _built(name: str) -> nn.Module:
    return zoo.make(name).double()


def build(name: str) -> nn.Module:
    """A fresh copy of an architecture in float64, its statistics estimated, in eval mode."""
    return copy.deepcopy(_built(name))


def example(name: str, seed: int = 0) -> Tensor:
    return zoo.images(2, seed=seed, size=zoo.ALL[name]).double()


def behind_convolutions(model: nn.Module, x: Tensor) -> set[str]:
    """The norms whose every input is the very object that a convolution or linear layer returned.

    By plain hooks, and none of these architectures uses such an output twice.
    """
    made: dict[int, Tensor] = {}
    norms: dict[nn.Module, list[bool]] = {}
    names = {module: name for name, module in model.named_modules()}

    def leave(module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        if output.dim() == module.weight.dim():  # type: ignore[operator]
            made[id(output)] = output

    def enter(module: nn.Module, args: tuple[object, ...]) -> None:
        norms.setdefault(module, []).append(id(args[0]) in made)

    hooks = []
    for module in model.modules():
        if isinstance(module, _ConvNd | nn.Linear):
            hooks.append(module.register_forward_hook(leave))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(enter))
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return {names[norm] for norm, behind in norms.items() if all(behind)}


@pytest.mark.parametrize("affine", ["frozen", "trains"])
@pytest.mark.parametrize("name", zoo.ALL)
def test_ten_steps_and_back(name: str, affine: str) -> None:
    """All norms behind a convolution fold; the training is that of eval mode; unfreeze undoes."""
    model, plain = build(name), build(name)
    before = Fingerprint(model, versions=False)
    x = example(name)
    report = sn.freeze(model, affine=affine, fold_on=x, fold_when="always")  # type: ignore[arg-type]
    assert set(report.folded) == behind_convolutions(plain, x)
    assert all(reason for _, reason in report.not_folded)
    assert len(report.folded) + len(report.not_folded) == len(report.frozen)

    for module in plain.modules():
        if isinstance(module, _BatchNorm) and affine == "frozen":
            module.requires_grad_(False)
    quiet(model)
    quiet(plain)
    for module in plain.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    weights = []
    for one in (model, plain):
        learning = [p for p in one.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learning, 1e-3, momentum=0.9, weight_decay=1e-3)
        for step in range(10):
            optimizer.zero_grad()
            one(example(name, seed=step)).square().mean().backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
        weights.append({n: p.detach().clone() for n, p in one.state_dict().items()})
    moved = 0.0
    for key, value in weights[0].items():
        start = _built(name).state_dict()[key]
        step = float((weights[1][key] - start).abs().max()) if value.is_floating_point() else 0.0
        moved = max(moved, step)
        torch.testing.assert_close(value, weights[1][key], rtol=1e-6, atol=1e-5 * step, msg=key)
    assert moved > 1e-6

    sn.unfreeze(model)
    model.load_state_dict(_built(name).state_dict())
    model.zero_grad()
    for (_, module), (_, built) in zip(
        model.named_modules(), _built(name).named_modules(), strict=True
    ):
        module.training = built.training
    different = Fingerprint(model, versions=False).differences(before)
    assert [d for d in different if "random" not in d and "attention_bias_cache" not in d] == []


@pytest.mark.parametrize("name", zoo.ALL)
@torch.no_grad()
def test_for_inference(name: str) -> None:
    """The folded model computes the same, and the one given is as it was."""
    model = build(name)
    before = Fingerprint(model)
    x = example(name)
    report = sn.fold(model, x)
    assert Fingerprint(model).differences(before) == []
    assert set(report.folded) >= behind_convolutions(model, x)
    assert len(report.folded) + len(report.refused) == sum(
        isinstance(m, _BatchNorm) for m in model.modules()
    )
    left = sum(isinstance(m, _BatchNorm) for m in report.model.modules())
    assert left == len(report.refused)
    for seed in (0, 9):
        torch.testing.assert_close(
            report.model(example(name, seed)), model(example(name, seed)), rtol=1e-8, atol=1e-10
        )
    assert not [m for m in report.model.modules() if type(m).__module__.startswith("stillnorm")]
