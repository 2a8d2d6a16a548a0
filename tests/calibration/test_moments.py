"""The algebra of merging: any grouping, any order, float64's own answer."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stillnorm.calibration.moments import Moments, average, pool
from support.oracles import pooled_moments


def values(n: int, seed: int, offset: float = 0.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 4, generator=g, dtype=torch.float64) * 2 + offset


def of(x: Tensor) -> Moments:
    return pool(x.mean(2), x.var(2, correction=0), x.shape[0] * x.shape[2])


def assert_same(a: Moments, mean: Tensor, var: Tensor) -> None:
    torch.testing.assert_close(a.mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.variance(), var, rtol=1e-9, atol=0)


def test_moments_of_a_batch_from_those_of_its_samples() -> None:
    x = values(7, seed=0)
    assert of(x).n.tolist() == [28.0] * 3
    assert_same(of(x), *pooled_moments([x]))


def test_moments_of_a_batch_from_one_group() -> None:
    x = values(7, seed=0)
    flat = x.movedim(1, 0).flatten(1)
    one = pool(flat.mean(1)[None], flat.var(1, correction=0)[None], flat.shape[1])
    assert_same(one, *pooled_moments([x]))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 50)), min_size=1, max_size=8),
    st.sampled_from([0.0, 10.0, 1e4]),
    st.randoms(use_true_random=False),
)
def test_merging_equals_pooling_in_any_order_and_grouping(
    batches: list[tuple[int, int]], offset: float, random: object
) -> None:
    parts = [values(n, seed, offset) for n, seed in batches]
    want = pooled_moments(parts)
    assert_same(reduce(Moments.merge, map(of, parts)), *want)
    random.shuffle(parts)  # type: ignore[attr-defined]
    half = len(parts) // 2
    if half:
        left, right = (reduce(Moments.merge, map(of, p)) for p in (parts[:half], parts[half:]))
        assert_same(left.merge(right), *want)


@pytest.mark.parametrize("offset", [1e6, 1e9])
def test_a_large_mean_cancels_nothing(offset: float) -> None:
    parts = [values(5, seed, offset) for seed in range(20)]
    got = reduce(Moments.merge, map(of, parts)).variance()
    shifted = pooled_moments([x - offset for x in parts])[1]
    torch.testing.assert_close(got, shifted, rtol=1e-6, atol=0)


def test_one_value_has_no_variance() -> None:
    one = of(values(1, seed=0)[:, :, :1])
    assert not one.has_variance
    assert one.merge(one).has_variance


def test_averages_are_torchs_instance_norm() -> None:
    x = values(6, seed=1).float()
    norm = torch.nn.InstanceNorm1d(3, track_running_stats=True, momentum=1.0)
    norm(x)
    parts = [
        average(part.double().mean(2), part.double().var(2, correction=0), 4 * len(part))
        for part in x.split([1, 3, 2])
    ]
    merged = reduce(Moments.merge, parts)
    assert (merged.n == 6).all()
    torch.testing.assert_close(merged.mean.float(), norm.running_mean)
    torch.testing.assert_close(merged.variance().float(), norm.running_var)
