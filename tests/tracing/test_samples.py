"""Per-sample moments equal float64's, whatever the mean, the layout, the dtype, the size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stillnorm.tracing import samples
from stillnorm.tracing.samples import batch_moments, read, sample_moments

RTOL = 1e-6


def oracle(x: Tensor) -> tuple[Tensor, Tensor]:
    flat = x.double().reshape(*x.shape[:2], -1)
    return flat.mean(2), flat.var(2, correction=0)


def check(x: Tensor) -> None:
    mean, var = read(sample_moments(x))
    want_mean, want_var = oracle(x)
    assert mean.dtype == var.dtype == torch.float64
    torch.testing.assert_close(var, want_var, rtol=RTOL, atol=0)
    # In units of the deviation: far below what float32 can say of a large mean.
    assert ((mean - want_mean).abs() <= 1e-6 * want_var.sqrt() + 1e-12 * want_mean.abs()).all()


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 9, 11), (2, 3, 4, 5, 6), (1, 2, 300, 300)])
def test_right_however_large_the_mean_is(shape: tuple[int, ...], offset: float) -> None:
    check(torch.randn(shape) + offset)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_right_for_channels_last_and_other_layouts(offset: float) -> None:
    x = torch.randn(3, 8, 40, 40) + offset
    check(x.to(memory_format=torch.channels_last))
    check(x.transpose(2, 3))
    check(x[:, ::2, 1:, ::3])
    check(x.flip(0).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_right_for_other_dtypes(dtype: torch.dtype) -> None:
    check(torch.randn(3, 4, 9, 9).to(dtype))


def test_half_does_not_overflow_in_the_sum() -> None:
    check((60000 + 1000 * torch.randn(2, 3, 50, 50).clamp(-3, 3)).half())


def test_one_position_is_the_value_itself_without_variance() -> None:
    x = torch.randn(6, 4)
    for shaped in (x, x[:, :, None], x[:, :, None, None]):
        mean, var = read(sample_moments(shaped))
        assert torch.equal(mean, x.double())
        assert torch.equal(var, torch.zeros(6, 4, dtype=torch.float64))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(7, 3, 5, 5)
    whole = sample_moments(x)
    monkeypatch.setattr(samples, "_CHUNK", 1)
    assert torch.equal(sample_moments(x), whole)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_chunks_of_a_batch_change_nothing_but_rounding(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = (torch.randn(7, 3, 5, 5) + 2).contiguous(memory_format=layout)
    whole = batch_moments(x)
    assert whole.shape == (3, 1, 3)
    for chunk in (1, 60, 160):
        monkeypatch.setattr(samples, "_CHUNK", chunk)
        (mean, var), (want_mean, want_var) = read(batch_moments(x)), read(whole)
        torch.testing.assert_close(mean, want_mean, rtol=RTOL, atol=RTOL)
        torch.testing.assert_close(var, want_var, rtol=RTOL, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_input_is_not_written(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 4, 4, dtype=dtype)
    before, version = x.clone(), x._version
    sample_moments(x)
    assert torch.equal(x, before)
    assert x._version == version


def test_an_empty_batch_has_no_samples() -> None:
    mean, var = read(sample_moments(torch.zeros(0, 3, 4, 4)))
    assert mean.shape == var.shape == (0, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_shows_in_its_channel_only(bad: float) -> None:
    x = torch.randn(2, 3, 4, 4)
    x[1, 2, 0, 0] = bad
    _, var = read(sample_moments(x))
    assert var.isfinite().tolist() == [[True] * 3, [True, True, False]]


@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 40),
    st.floats(-1e6, 1e6),
    st.floats(1e-3, 1e3),
    st.integers(0, 99),
)
def test_right_for_any_scale_and_offset(
    n: int, c: int, s: int, offset: float, scale: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, c, s, generator=g) * scale + offset
    mean, var = read(sample_moments(x))
    want_mean, want_var = oracle(x)
    torch.testing.assert_close(var, want_var, rtol=RTOL, atol=1e-30)
    torch.testing.assert_close(mean, want_mean, rtol=1e-9, atol=1e-6 * scale)
