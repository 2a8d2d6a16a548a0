"""A plain affine layer that computes the eval function of a norm."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stillnorm as sn
from repair.replacing import (
    PLAIN,
    around,
    exact,
    formula,
)
from stillnorm.repair import AffineNorm, replace
from support import layers
from support.layers import conv_input, conv_net, settle
from support.tolerances import CLOSE


@pytest.mark.parametrize("name", [*PLAIN, "sync"])
def test_affine_is_the_eval_function(name: str) -> None:
    layer, x = layers.make(name), layers.example(name)
    net, want = around(layer), formula(layer, x)
    replace(net, "affine")
    assert type(net[0]) is AffineNorm
    for mode in (True, False):
        torch.testing.assert_close(net.train(mode)(x).double(), want, rtol=1e-5, atol=1e-5)


def test_scale_and_shift_are_rounded_once() -> None:
    layer = layers.make("2d")
    net = around(layer)
    replace(net, "affine")
    s = layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()
    t = layer.bias.double() - layer.running_mean.double() * s
    for got, want in ((net[0].scale, s), (net[0].shift, t)):
        torch.testing.assert_close(got.double(), want, rtol=2**-24, atol=0)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    mean=st.floats(-1e4, 1e4),
    scale=st.floats(1e-6, 1e6),
    eps=st.sampled_from([1e-8, 1e-5, 1e-3, 0.5]),
    affine=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_affine_of_any_statistics(
    seed: int, mean: float, scale: float, eps: float, affine: bool, dtype: torch.dtype
) -> None:
    """Within the roundings of x, mean and scale, whatever cancels."""
    layer = nn.BatchNorm1d(5, eps=eps, affine=affine)
    settle(layer, seed)
    layer.running_mean.mul_(mean)
    layer.running_var.mul_(scale)
    layer.to(dtype)
    net, x = around(layer), mean + torch.randn(4, 5).to(dtype)
    replace(net, "affine")
    want = formula(layer, x)
    s = (layer.running_var.double() + eps).rsqrt() * (layer.weight.double().abs() if affine else 1)
    size = (x.double().abs() + layer.running_mean.double().abs()) * s
    size = size + (layer.bias.double().abs() if affine else 0)
    assert ((net(x).double() - want).abs() <= 4 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("params", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("inputs", [torch.float16, torch.bfloat16])
def test_affine_keeps_the_dtype_rules_of_batch_norm(
    inputs: torch.dtype, params: torch.dtype
) -> None:
    if params not in (torch.float32, inputs):
        return
    layer = layers.make("2d").to(params).eval()
    net, x = around(layer), layers.example("2d").to(inputs)
    want = layer(x)
    replace(net, "affine")
    got = net(x)
    assert got.dtype == want.dtype == inputs
    size = (x.float() - layer.running_mean.float().view(-1, 1, 1)).abs().max() + 4
    atol = 4 * torch.finfo(inputs).eps * float(size) if params == inputs else 1e-3
    torch.testing.assert_close(got, want, rtol=CLOSE[inputs][0], atol=atol)


def test_affine_learns_where_the_layer_did() -> None:
    learning, half, bare, held = (around(layers.make("2d")) for _ in range(4))
    half[0].bias.requires_grad_(False)
    bare[0] = layers.make("affine=False")
    sn.freeze(held)
    want = [(True, True), (True, False), (False, False), (False, False)]
    for net, learns in zip((learning, half, bare, held), want, strict=True):
        replace(net, "affine")
        assert (net[0].scale.requires_grad, net[0].shift.requires_grad) == learns


def test_affine_takes_a_checkpoint_of_the_batch_norm_and_is_none() -> None:
    net, other = conv_net(seed=1), conv_net(seed=3)
    state, x = other.state_dict(), conv_input()
    want = exact(other, x)
    replace(net, "affine")
    net.load_state_dict(state, strict=True)
    torch.testing.assert_close(exact(net, x), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"1\.weight"):
        other.load_state_dict(net.state_dict())


def test_affine_checks_its_input_as_batch_norm_does() -> None:
    net = around(layers.make("2d"))
    replace(net, "affine")
    for shape in ((2, 1, 3, 3), (4,), (2, 5, 3, 3)):
        with pytest.raises(ValueError, match=r"expected \(N, 4, \*\)"):
            net(torch.randn(shape))


def test_affine_is_scripted_exported_and_compiled() -> None:
    net, x = conv_net().eval(), conv_input()
    replace(net, "affine")
    want = net(x)
    for other in (
        torch.jit.script(net),
        torch.export.export(net, (x,)).module(),
        torch.compile(net, backend="eager", fullgraph=True),
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
    ):
        torch.testing.assert_close(other(x), want)


def test_affine_of_meta_tensors_takes_a_checkpoint_later() -> None:
    with torch.device("meta"):
        net = conv_net()
    replace(net, "affine")
    net.to_empty(device="cpu")
    other = conv_net()
    net.load_state_dict(other.state_dict())
    x = conv_input()
    torch.testing.assert_close(exact(net, x), exact(other, x), rtol=1e-5, atol=1e-5)
