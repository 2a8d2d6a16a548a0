"""The largest magnitude of a float16 input is seen; other dtypes cost nothing more."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from stillnorm.tracing import trace
from stillnorm.tracing.samples import largest_half


def seen(x: Tensor) -> float | None:
    return trace(nn.BatchNorm2d(x.shape[1]).to(x.dtype), x).calls[0].largest


@pytest.mark.parametrize("value", [40000.0, -40000.0, torch.inf, -torch.inf])
def test_of_either_sign(value: float) -> None:
    x = torch.randn(2, 3, 4, 4).half()
    x[1, 2, 3, 0] = value
    assert seen(x) == abs(value)


def test_nan_is_not_overlooked() -> None:
    x = torch.full((2, 3, 4, 4), 60000.0).half()
    x[0, 0, 0, 0] = torch.nan
    largest = seen(x)
    assert largest is not None
    assert math.isnan(largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_other_types_are_not_read(dtype: torch.dtype) -> None:
    assert seen(torch.randn(2, 3, 4, 4).to(dtype)) is None


def test_under_autocast_it_is_that_of_the_type_in_use() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16):
            output: Tensor = model(x)
        return output

    (call,) = trace(net, torch.randn(2, 3, 4, 4), forward=forward).calls
    assert call.dtype == torch.float16
    assert call.largest is not None
    assert call.largest > 0


def test_no_values_have_no_largest() -> None:
    assert largest_half(torch.zeros(0, 3).half()) is None
