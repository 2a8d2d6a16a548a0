"""NormLayer: the three switches, checked against what a forward really does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import stillnorm as sn
from stillnorm.norms import NormLayer, find_norms
from support import layers
from support.layers import CASES
from support.zoo import torchvision, transformers


def view(layer: nn.Module) -> NormLayer:
    (norm,) = find_norms(layer)
    return norm


def untracked() -> nn.Module:
    layer = layers.make("2d")
    layer.track_running_stats = False
    return layer


def instance_untracked() -> nn.Module:
    layer = layers.make("instance2d")
    layer.track_running_stats = False
    return layer


LAYERS = {
    name: (lambda name=name: layers.make(name)) for name in CASES if name not in ("1d-flat",)
} | {
    "no statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "no statistics, no affine": lambda: nn.BatchNorm2d(4, affine=False, track_running_stats=False),
    "untracked later": untracked,
    "instance": lambda: nn.InstanceNorm2d(4),
    "instance untracked later": instance_untracked,
    "instance, momentum None": lambda: layers.settle(
        nn.InstanceNorm2d(4, momentum=None, track_running_stats=True)
    ),
    "momentum 0": lambda: layers.settle(nn.BatchNorm2d(4, momentum=0.0)),
    "torchvision": lambda: torchvision.ops.FrozenBatchNorm2d(4),
    "transformers": lambda: transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d(4),
    "sticky": lambda: layers.settle(layers.StickyNorm(4)),
}


def really(layer: nn.Module, x: Tensor) -> tuple[str, bool]:
    """What one forward normalises by and whether it moves the running mean or variance.

    Two perturbations tell: of another sample, and of a far corner of the same sample.
    """
    layer = copy.deepcopy(layer)
    before = {k: t.clone() for k, t in layer.state_dict().items() if k.startswith("running")}
    state = {k: t.clone() for k, t in layer.state_dict().items()}

    def first(x: Tensor) -> Tensor:
        put_back()
        return layer(x)[0].flatten(1)[:, 0].detach().clone()

    def put_back() -> None:  # load_state_dict refuses an untracked instance norm with statistics
        for key, tensor in layer.state_dict().items():
            tensor.copy_(state[key])

    base = first(x)
    other, own = x.clone(), x.clone()
    other[1] = other[1] * 5 + 3
    own[0].view(own.shape[1], -1)[:, -1] += 50
    by = "running"
    if not torch.allclose(first(other), base, atol=1e-5):
        by = "batch"
    elif not torch.allclose(first(own), base, atol=1e-5):
        by = "sample"
    put_back()
    layer(x)
    # Beyond rounding: with momentum 0 an instance norm writes the mean of equal values back.
    moved = any(not torch.allclose(layer.state_dict()[k], t) for k, t in before.items())
    return by, moved


@pytest.mark.parametrize("hold", [None, "frozen", "trains"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_switches_say_what_a_forward_does(name: str, training: bool, hold: str | None) -> None:
    layer = LAYERS[name]()
    if hold is not None:
        sn.freeze(layer, affine=hold)  # type: ignore[arg-type]
    layer.training = training
    shape = CASES[name].shape if name in CASES else (3, 4, 5, 6)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) + 1
    by, moved = really(layer, x)
    assert view(layer).normalizes_by(training) == by
    assert view(layer).updates_statistics(training) is moved


@pytest.mark.parametrize("hold", [None, "frozen", "trains"])
@pytest.mark.parametrize("name", LAYERS)
def test_trains_affine_says_whether_a_gradient_arrives(name: str, hold: str | None) -> None:
    layer = LAYERS[name]().eval()
    if hold is not None:
        sn.freeze(layer, affine=hold)  # type: ignore[arg-type]
    shape = CASES[name].shape if name in CASES else (3, 4, 5, 6)
    layer(torch.randn(shape).requires_grad_()).sum().backward()
    affine = (layer.weight, layer.bias)
    arrives = any(p is not None and p.is_leaf and p.grad is not None for p in affine)
    assert view(layer).trains_affine is arrives


def test_what_it_reads_off() -> None:
    norm = view(layers.settle(nn.BatchNorm2d(4, eps=0.3, momentum=None)))
    assert (norm.num_features, norm.eps, norm.momentum) == (4, 0.3, None)
    assert (norm.kind, norm.family, norm.provider) == ("BatchNorm2d", "batch", "torch")
    assert set(norm.tensors()) == {
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    }
    assert norm.tracks
    assert norm.has_statistics
    assert not norm.is_lazy
    assert not norm.is_scripted
    assert repr(norm) == "NormLayer((root): BatchNorm2d(4))"
    bare = view(nn.BatchNorm1d(3, affine=False, track_running_stats=False))
    assert bare.tensors() == {}
    assert not bare.has_statistics
    assert not bare.tracks


def test_lazy_until_the_first_forward() -> None:
    for make in (nn.LazyBatchNorm2d, nn.LazyInstanceNorm2d):
        layer = make()
        assert view(layer).is_lazy
        assert view(layer).num_features == 0
        assert not view(layer).never_estimated
        layer(torch.randn(2, 5, 4, 4))
        assert not view(layer).is_lazy
        assert view(layer).num_features == 5


def test_never_estimated_is_exact() -> None:
    layer = nn.BatchNorm2d(4)
    assert view(layer).never_estimated
    layer.num_batches_tracked.fill_(9)  # the values count, not the counter
    assert view(layer).never_estimated
    layer.running_var[3] = 1 + 2**-23
    assert not view(layer).never_estimated
    assert not view(nn.BatchNorm2d(4, track_running_stats=False)).never_estimated
    assert not view(nn.BatchNorm2d(4).to("meta")).never_estimated
    nan = nn.BatchNorm2d(4)
    nan.running_mean[0] = float("nan")
    assert not view(nan).never_estimated


def test_momentum_as_torch_has_it() -> None:
    assert view(nn.BatchNorm2d(4, momentum=0.99)).momentum == 0.99
    assert view(torchvision.ops.FrozenBatchNorm2d(4)).momentum is None
