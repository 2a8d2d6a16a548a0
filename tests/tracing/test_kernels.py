"""Calls that normalise are read as torch reads them: by position, by keyword, by default."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillnorm.tracing import trace
from stillnorm.tracing.kernels import Kernel, kernel_of

X = torch.randn(5, 3, 4, 2)
MEAN, VAR = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 1.0, 0.5])


def kernel(function: object, *args: object, **kwargs: object) -> Kernel:
    found = kernel_of(function, args, kwargs)
    assert found is not None
    return found


CALLS = {
    "defaults": (kernel(F.batch_norm, X, MEAN, VAR), "running"),
    "keywords": (kernel(F.batch_norm, input=X, running_mean=MEAN, running_var=VAR), "running"),
    "training": (kernel(F.batch_norm, X, None, None, training=True), "batch"),
    "training by position": (
        kernel(F.batch_norm, X, None, None, None, None, True, 0.1, 1e-5),
        "batch",
    ),
    "torch.batch_norm": (
        kernel(torch.batch_norm, X, None, None, MEAN, VAR, False, 0.1, 1e-5, False),
        "running",
    ),
    "torch.native_batch_norm": (
        kernel(torch.native_batch_norm, X, None, None, None, None, True, 0.1, 1e-5),
        "batch",
    ),
    "instance by default": (kernel(F.instance_norm, X), "sample"),
    "instance by running": (
        kernel(F.instance_norm, X, MEAN, VAR, use_input_stats=False),
        "running",
    ),
    "torch.instance_norm": (
        kernel(torch.instance_norm, X, None, None, None, None, True, 0.1, 1e-5, False),
        "sample",
    ),
}


def first(output: object) -> Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]


def normalized(mean: Tensor, var: Tensor) -> Tensor:
    return (X - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize(("call", "used"), CALLS.values(), ids=CALLS)
def test_what_is_said_to_be_used_is_used(call: Kernel, used: str) -> None:
    dims = {"batch": (0, 2, 3), "sample": (2, 3)}
    if used == "running":
        want = normalized(MEAN.view(1, -1, 1, 1), VAR.view(1, -1, 1, 1))
    else:
        var, mean = torch.var_mean(X, dims[used], correction=0, keepdim=True)
        want = normalized(mean, var)
    assert call.used == used
    torch.testing.assert_close(first(call()), want)


@pytest.mark.parametrize("call", [call for call, _ in CALLS.values()], ids=CALLS)
def test_the_other_way_round(call: Kernel) -> None:
    assert call.by_input().used == call.statistics
    by_running = call.by_running(MEAN, VAR)
    assert by_running.used == "running"
    want = normalized(MEAN.view(1, -1, 1, 1), VAR.view(1, -1, 1, 1))
    torch.testing.assert_close(first(by_running()), want)


def test_values_behind_one_mean() -> None:
    assert kernel(F.batch_norm, X, None, None, training=True).values == 5 * 4 * 2
    assert kernel(F.instance_norm, X).values == 4 * 2
    assert kernel(F.batch_norm, X[:0], None, None, training=True).values == 0


def test_by_input_leaves_the_statistics_where_asked() -> None:
    mean, var = torch.zeros(3), torch.ones(3)
    kernel(F.batch_norm, X, MEAN, VAR, momentum=0.3).by_input(mean, var)()
    torch.testing.assert_close(mean, X.mean((0, 2, 3)))
    torch.testing.assert_close(var, X.var((0, 2, 3)))
    assert MEAN.tolist() == [1, 2, 3]


def test_other_functions_do_not_normalise() -> None:
    assert kernel_of(F.group_norm, (X, 3), {}) is None
    assert kernel_of(torch.relu, (X,), {}) is None


def test_an_eps_of_0_is_no_obstacle_to_batch_statistics() -> None:
    """torch refuses it in train mode; a network in eval has it, and is to be looked at."""
    net = nn.Sequential(nn.BatchNorm1d(3, eps=0.0))
    x = torch.randn(16, 3)
    (call,) = trace(net, x, flow="batch").calls
    assert call.used == "batch"
