"""The moments of a batch are exact, and the output is what the call itself would have given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stillnorm.tracing import read
from stillnorm.tracing.kernels import Kernel, kernel_of
from stillnorm.tracing.measures import by_whole_batch
from support.oracles import pooled_moments
from support.tolerances import STATISTICS_RTOL


def assert_same_output(output: Tensor, x: Tensor, *affine: Tensor) -> None:
    """Assert train mode's output, but for rounding: of the mean to float32, and of the output."""
    own = F.batch_norm(x, None, None, *affine, training=True)
    assert output.dtype == own.dtype
    assert output.stride() == own.stride()
    want = F.batch_norm(x.double(), None, None, *(a.double() for a in affine), training=True)
    flat = x.double().movedim(1, 0).flatten(1)
    ratio = float((flat.mean(1).abs() / flat.std(1, correction=0)).max())
    tolerance = 2 * torch.finfo(own.dtype).eps + 4 * torch.finfo(torch.float32).eps * (1 + ratio)
    torch.testing.assert_close(output.double(), want, rtol=tolerance, atol=tolerance)


def measured(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return what `by_whole_batch` says of x: the moments of groups, and how many groups."""
    kernel = kernel_of(F.batch_norm, (x, None, None), {"training": True})
    assert isinstance(kernel, Kernel)
    output, moments = by_whole_batch(kernel)
    mean, var = read(moments)
    assert_same_output(output, x)
    groups = len(mean)
    overall = mean.mean(0)
    n = x.numel() // x.shape[1]
    return overall, (var + (mean - overall) ** 2).mean(0) * n / (n - 1), groups


INPUTS = {
    "contiguous": ((4, 3, 2), (2, 8, 7, 7), (16, 8, 20, 20), (2, 4, 5, 6, 7), (2, 3, 400, 400)),
    "channels_last": ((2, 8, 7, 7), (16, 8, 20, 20), (2, 3, 400, 400)),
}


@pytest.mark.parametrize("offset", [0.0, 1.0, 7.0, 100.0, 1e4])
@pytest.mark.parametrize(
    ("layout", "shape"), [(layout, shape) for layout in INPUTS for shape in INPUTS[layout]]
)
def test_exact_in_every_layout(layout: str, shape: tuple[int, ...], offset: float) -> None:
    x = torch.randn(shape) + offset
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    mean, var, _ = measured(x)
    want_mean, want_var = pooled_moments([x])
    torch.testing.assert_close(var, want_var, rtol=STATISTICS_RTOL, atol=0)
    spacing = torch.finfo(torch.float32).eps * want_mean.abs()
    assert ((mean - want_mean).abs() <= spacing + 1e-6 * want_var.sqrt()).all()


@pytest.mark.parametrize("rows", [2, 1000, 20000])
@pytest.mark.parametrize("offset", [3.0, 1e4])
def test_exact_for_rows_whose_kernel_adds_up_in_float32(rows: int, offset: float) -> None:
    x = torch.randn(rows, 4) + offset
    for shaped in (x, x[:, :, None, None]):
        mean, var, groups = measured(shaped)
        assert groups == 1
        want_mean, want_var = pooled_moments([x])
        torch.testing.assert_close(var, want_var, rtol=STATISTICS_RTOL, atol=0)
        torch.testing.assert_close(mean, want_mean, rtol=1e-9, atol=1e-6)


def test_rows_of_instance_norm_stay_samples() -> None:
    arguments = (torch.randn(5, 3, 1), torch.zeros(3), torch.ones(3))
    kernel = kernel_of(F.instance_norm, arguments, {"use_input_stats": False})
    assert kernel is not None
    assert by_whole_batch(kernel)[1].shape == (3, 5, 3)


@pytest.mark.parametrize(
    ("dtype", "affine_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_the_output_has_the_dtype_and_the_values_of_train_mode(
    dtype: torch.dtype, affine_dtype: torch.dtype
) -> None:
    x = (3 * torch.randn(4, 5, 6, 7) + 2).to(dtype)
    affine = torch.rand(2, 5).to(affine_dtype)
    kernel = kernel_of(F.batch_norm, (x, None, None, *affine), {"training": True})
    assert kernel is not None
    output, _ = by_whole_batch(kernel)
    assert_same_output(output, x, *affine)


def test_statistics_returned_beside_the_output_are_those_of_the_call() -> None:
    x = torch.randn(4, 3, 5)
    arguments = (x, None, None, None, None, True, 0.1, 1e-5)
    kernel = kernel_of(torch.native_batch_norm, arguments, {})
    assert kernel is not None
    output, moments = by_whole_batch(kernel)
    for got, want in zip(output, torch.native_batch_norm(*arguments), strict=True):
        assert torch.equal(got, want)
    assert moments.shape == (3, 1, 3)


def test_a_call_by_running_statistics_is_made_as_it_is() -> None:
    x, mean, var = torch.randn(4, 3, 5), torch.randn(3), torch.rand(3) + 1
    kernel = kernel_of(F.batch_norm, (x, mean, var), {})
    assert kernel is not None
    output, moments = by_whole_batch(kernel)
    assert torch.equal(output, F.batch_norm(x, mean, var))
    assert moments.shape == (3, 1, 3)


def test_an_empty_batch_is_passed_on() -> None:
    kernel = kernel_of(F.batch_norm, (torch.zeros(0, 3, 4, 4), None, None), {"training": True})
    assert kernel is not None
    output, moments = by_whole_batch(kernel)
    assert output.shape == (0, 3, 4, 4)
    assert moments.shape == (3, 0, 3)


@pytest.mark.parametrize("layout", INPUTS)
@pytest.mark.parametrize("distance", [2.0, 1e3])
def test_samples_sorted_by_class(layout: str, distance: float) -> None:
    x = torch.randn(9, 8, 40, 200)
    x[:3] += distance
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    _, var, _ = measured(x)
    torch.testing.assert_close(var, pooled_moments([x])[1], rtol=STATISTICS_RTOL, atol=0)


def test_two_distant_batches_keep_the_bound() -> None:
    # Batch means 2 sigma apart at |mean| = 6 sigma: where rounded means would hurt most.
    batches = [torch.randn(4, 64, 9, 9) + 6, torch.randn(4, 64, 9, 9) - 6]
    parts = [measured(x) for x in batches]
    assert all(groups == 1 for _, _, groups in parts)
    n = 4 * 81
    (m1, v1, _), (m2, v2, _) = parts
    var = ((n - 1) * (v1 + v2) + n * (m1 - m2) ** 2 / 2) / (2 * n - 1)
    torch.testing.assert_close(var, pooled_moments(batches)[1], rtol=STATISTICS_RTOL, atol=0)


def test_no_buffer_is_written() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    kernel = kernel_of(F.batch_norm, (torch.randn(4, 3, 5), mean, var), {"training": True})
    assert kernel is not None
    by_whole_batch(kernel)
    assert mean.tolist() == [0, 0, 0]
    assert var.tolist() == [1, 1, 1]
