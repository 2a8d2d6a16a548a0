"""The statistics taken from a norm's own kernel are as good as those measured, or not taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from stillnorm.tracing import read
from stillnorm.tracing.kernels import Kernel, kernel_of
from stillnorm.tracing.measures import by_kernel
from support.oracles import pooled_moments
from support.tolerances import STATISTICS_RTOL


def measured(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return what `by_kernel` says of x: the moments of groups, and how many groups."""
    kernel = kernel_of(F.batch_norm, (x, None, None), {"training": True})
    assert isinstance(kernel, Kernel)
    output, moments = by_kernel(kernel)
    assert torch.equal(output, F.batch_norm(x, None, None, training=True))
    mean, var = read(moments)
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
    assert by_kernel(kernel)[1].shape == (3, 5, 3)


def test_the_kernel_serves_contiguous_maps_with_a_moderate_mean() -> None:
    x = torch.randn(4, 3, 8, 8)
    assert measured(x)[2] == 1
    assert measured(x + 100)[2] == 4, "a large mean is measured sample by sample"
    assert measured(x.to(memory_format=torch.channels_last))[2] == 4
    assert measured(x.double())[2] == 4
    x[:, 1] = 5.0
    assert measured(x)[2] == 4, "a constant channel has an infinite |mean| / sigma"


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
    by_kernel(kernel)
    assert mean.tolist() == [0, 0, 0]
    assert var.tolist() == [1, 1, 1]
