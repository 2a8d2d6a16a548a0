"""norm_by_constants: the bits of F.batch_norm forward, its gradient backward, nothing saved."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from stillnorm.holding.algebra import input_gradient, norm_by_constants
from support import oracles
from support.tolerances import CLOSE, GRADIENT_ULP

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
FLOATS = st.integers(0, 2**31 - 1)


def constants(
    channels: int, dtype: torch.dtype, seed: int, weight: bool = True, bias: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Mean, variance, weight and bias over many orders of magnitude; the variance may be 0."""
    g = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(channels, generator=g, dtype=torch.float64)

    var = torch.exp(3 * draw()) * (torch.rand(channels, generator=g) > 0.1)
    return (
        (3 * draw()).to(dtype),
        var.to(dtype),
        (draw() * torch.exp(2 * draw())).to(dtype) if weight else None,
        draw().to(dtype) if bias else None,
    )


SHAPES = st.lists(st.integers(0, 6), min_size=0, max_size=3)


@settings(max_examples=600)
@given(
    batch=st.integers(0, 5),
    channels=st.integers(1, 9),
    spatial=SHAPES,
    dtype=st.sampled_from(DTYPES),
    wide=st.booleans(),
    weight=st.booleans(),
    bias=st.booleans(),
    eps=st.sampled_from([1e-5, 1e-3, 0.1]),
    layout=st.sampled_from(["contiguous", "channels_last", "strided", "expanded"]),
    seed=FLOATS,
)
def test_same_bits_forward_and_the_gradient_of_eval_mode(
    batch: int,
    channels: int,
    spatial: list[int],
    dtype: torch.dtype,
    wide: bool,
    weight: bool,
    bias: bool,
    eps: float,
    layout: str,
    seed: int,
) -> None:
    """Any shape (also empty), dtype, mixed precision, layout, magnitude."""
    half = dtype in (torch.float16, torch.bfloat16)
    # Half inputs meet a float32 layer under autocast and in half-converted models.
    of_layer = torch.float32 if half and wide else dtype
    mean, var, w, b = constants(channels, of_layer, seed, weight, bias)
    g = torch.Generator().manual_seed(seed)

    def tensor() -> Tensor:
        t = torch.randn(batch, channels, *spatial, generator=g, dtype=torch.float64).to(dtype)
        if layout == "channels_last" and t.dim() == 4:
            return t.contiguous(memory_format=torch.channels_last)
        if layout == "strided":
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "expanded" and batch:
            return t[:1].expand_as(t)
        return t

    x, dy = tensor(), tensor()
    plain = x.detach().requires_grad_()
    expected = F.batch_norm(plain, mean, var, w, b, False, 0.0, eps)
    (expected_gradient,) = torch.autograd.grad(expected, plain, dy)
    held = x.detach().requires_grad_()
    y = norm_by_constants(held, mean, var, w, b, eps)
    (gradient,) = torch.autograd.grad(y, held, dy)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    assert gradient.dtype == expected_gradient.dtype
    assert gradient.shape == expected_gradient.shape
    assert oracles.ulp_distance(gradient, expected_gradient) <= GRADIENT_ULP[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_formula(dtype: torch.dtype) -> None:
    """Against the formula in float64, in units in the last place of the largest term."""
    mean, var, weight, bias = constants(5, dtype, seed=4)
    x = torch.randn(3, 5, 4, 4, dtype=torch.float64).to(dtype)
    y = norm_by_constants(x, mean, var, weight, bias, 1e-5)
    expected = oracles.batch_norm(x, mean, var, weight, bias, 1e-5)
    rtol, atol = CLOSE[dtype]
    scale = float(expected.abs().max())
    torch.testing.assert_close(y.double(), expected, rtol=rtol, atol=atol + rtol * scale)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("spatial", [(), (3,), (2, 3), (2, 2, 2)])
def test_gradients_of_every_order(affine: bool, spatial: tuple[int, ...]) -> None:
    """Reverse mode, batched, and reverse over reverse, against finite differences."""
    mean, var, weight, bias = constants(3, torch.float64, seed=1, weight=affine, bias=affine)
    x = torch.randn(4, 3, *spatial, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor) -> Tensor:
        return norm_by_constants(x, mean, var, weight, bias, 1e-3)

    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_second_order_in_half_precision(dtype: torch.dtype) -> None:
    """A gradient penalty in half precision has the gradient that an eval-mode layer gives it."""
    mean, var, weight, bias = constants(4, torch.float32, seed=3)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64).to(dtype)

    def penalty(norm: object) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = norm(leaf)  # type: ignore[operator]
        (first,) = torch.autograd.grad(y.pow(2).sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        return first, second

    ours = penalty(lambda t: norm_by_constants(t, mean, var, weight, bias, 1e-5))
    torchs = penalty(lambda t: F.batch_norm(t, mean, var, weight, bias, False, 0.0, 1e-5))
    rtol, _ = CLOSE[dtype]
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * rtol, atol=0)


def test_saves_two_vectors() -> None:
    """F.batch_norm in eval mode saves its whole input; this saves var and weight."""
    mean, var, weight, bias = constants(3, torch.float32, seed=1)
    x = torch.randn(8, 3, 16, 16, requires_grad=True)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        norm_by_constants(x, mean, var, weight, bias, 1e-5)
    assert [t.shape for t in saved] == [(3,), (3,)]
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        F.batch_norm(x, mean, var, weight, bias, False, 0.0, 1e-5)
    assert x.shape in [t.shape for t in saved]  # what the test above can see


def test_no_gradient_reaches_the_constants() -> None:
    """Also when they require one."""
    tensors = [t.requires_grad_() for t in constants(3, torch.float32, seed=1) if t is not None]
    mean, var, weight, bias = tensors
    for x in (torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)):
        y = norm_by_constants(x, mean.detach(), var.detach(), weight, bias, 1e-5)
        assert y.requires_grad == x.requires_grad
        if y.requires_grad:
            y.sum().backward()
    assert weight.grad is None
    assert bias.grad is None


def test_does_not_read_the_input_in_the_backward() -> None:
    """The stand-ins for input and mean in torch's kernel are not read: NaN in them is harmless."""
    var = torch.tensor([2.0, 0.5]).half()
    dy = torch.randn(3, 2, 4).half()
    plain = torch.full((3, 2, 4), float("nan"), dtype=torch.half, requires_grad=True)
    expected = F.batch_norm(plain, torch.zeros(2).half(), var, None, None, False, 0.0, 1e-5)
    (expected_gradient,) = torch.autograd.grad(expected, plain, dy)
    assert torch.equal(input_gradient(dy, var, None, 1e-5), expected_gradient)
    assert torch.isfinite(expected_gradient).all()


def test_a_write_to_the_statistics_before_the_backward_is_not_silent() -> None:
    """As for any saved tensor, torch refuses the backward."""
    mean, var, weight, bias = constants(3, torch.float32, seed=1)
    y = norm_by_constants(torch.randn(2, 3, requires_grad=True), mean, var, weight, bias, 1e-5)
    var.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
