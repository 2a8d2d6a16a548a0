"""Distances and noise, against the plain formulas on the plain values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stillnorm.diagnosis.measures.measure import Samples, batch_noise, between, distance, samples_of
from stillnorm.tracing import Call


def call(x: Tensor, batch: int = 0, occurrence: int = 0) -> Call:
    """What a trace records of one call with the input `x`, (N, C, *)."""
    flat = x.double().reshape(*x.shape[:2], -1)
    mean, var = flat.mean(2), flat.var(2, correction=0)
    shape, dtype = tuple(x.shape), x.dtype
    return Call("bn", occurrence, 0, batch, None, shape, dtype, "batch", mean, var, False)


def images(n: int, seed: int = 0, channels: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, 5, 5, generator=g, dtype=torch.float64)
    return x + torch.randn(n, channels, 1, 1, generator=g, dtype=torch.float64)


def samples(x: Tensor) -> Samples:
    got = samples_of([call(x)], [len(x)])
    assert got is not None
    return got


def test_pooled_moments_are_those_of_all_values() -> None:
    x = images(6)
    mean, var = samples(x).pooled
    values = x.movedim(1, 0).flatten(1)
    torch.testing.assert_close(mean, values.mean(1))
    torch.testing.assert_close(var, values.var(1, correction=0))


def test_batches_of_unequal_size_are_one_row_per_sample() -> None:
    x = images(7)
    got = samples_of([call(x[:4], batch=0), call(x[4:], batch=1)], [4, 3])
    assert got is not None
    torch.testing.assert_close(got.mean, samples(x).mean)
    assert got.per_batch == 3.5


def test_frames_folded_into_the_batch_belong_to_their_sample() -> None:
    """(3 samples, 5 frames) as 15 rows: 3 rows, whose moments are over all frames."""
    x = images(15)
    got = samples_of([call(x)], [3])
    assert got is not None
    torch.testing.assert_close(got.mean, x.reshape(3, 5, 4, 25).mean((1, 3)))
    torch.testing.assert_close(got.square, x.square().reshape(3, 5, 4, 25).mean((1, 3)))


def test_rows_that_cannot_be_divided_count_as_one_sample() -> None:
    got = samples_of([call(images(7))], [3])
    assert got is not None
    assert len(got) == 1


def test_several_call_sites_are_averaged_per_sample() -> None:
    a, b = images(4, seed=0), images(4, seed=1)
    got = samples_of([call(a), call(b, occurrence=1)], [4])
    assert got is not None
    torch.testing.assert_close(got.mean, (a.mean((2, 3)) + b.mean((2, 3))) / 2)


def test_no_call_is_no_sample() -> None:
    assert samples_of([], []) is None


def test_right_statistics_are_at_distance_zero_and_wrong_ones_at_theirs() -> None:
    x = images(400)
    mean, var = samples(x).pooled
    right = distance(mean, var, 0.0, samples(x), instance=False)
    wrong = distance(mean - 0.5 * var.sqrt(), var / 2, 0.0, samples(x), instance=False)
    assert right is not None
    assert wrong is not None
    assert (right.mean, right.variance) == (0.0, 0.0)
    assert right.ratio == pytest.approx(1)
    assert wrong.mean == pytest.approx(0.5 * 2**0.5, rel=0.01)
    assert wrong.variance == pytest.approx(2 * (2 - 1) / (2 + 1), rel=0.01)
    assert wrong.ratio == pytest.approx(2)
    assert wrong.is_far()
    assert not right.is_far()


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_variances_too_large_and_too_small_weigh_the_same(factor: float) -> None:
    x = images(400)
    mean, var = samples(x).pooled
    seen = distance(mean, var * factor, 0.0, samples(x), instance=False)
    assert seen is not None
    assert seen.variance == pytest.approx(1.2, rel=0.02)


def test_an_error_of_the_mean_is_none_of_the_variance() -> None:
    x = images(200)
    mean, var = samples(x).pooled
    seen = distance(mean + 3 * var.sqrt(), var, 0.0, samples(x), instance=False)
    assert seen is not None
    assert seen.variance == 0


def test_instance_statistics_are_compared_with_the_variance_inside_samples() -> None:
    x = images(200)
    inside = x.var((2, 3), correction=0).mean(0)
    mean = x.mean((0, 2, 3))
    seen = distance(mean, inside, 0.0, samples(x), instance=True)
    assert seen is not None
    assert seen.variance < 0.05


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_broken_statistics_have_no_distance(bad: float) -> None:
    x = images(8)
    var = torch.full((4,), bad, dtype=torch.float64)
    assert distance(torch.zeros(4), var, 1e-5, samples(x), instance=False) is None
    x[0, 0, 0, 0] = torch.nan
    assert distance(torch.zeros(4), torch.ones(4), 1e-5, samples(x), instance=False) is None


def test_call_sites_that_differ_are_far_apart_and_siamese_ones_are_not() -> None:
    x, y = images(40, seed=0), images(40, seed=1)
    same, other = (
        between(samples(x), samples(y), 1e-5),
        between(samples(x), samples(2 + 3 * y), 1e-5),
    )
    assert same is not None
    assert other is not None
    assert not same.is_far()
    assert other.is_far()


@pytest.mark.parametrize("size", [2, 8])
def test_the_predicted_noise_is_the_scatter_of_real_batch_means(size: int) -> None:
    """Positions do not count: 25 of them per image leave the noise at that of one brightness."""
    x = images(6400)
    means = x.mean((2, 3)).reshape(-1, size, 4).mean(1)
    scatter = float((means.var(0) / x.movedim(1, 0).flatten(1).var(1)).mean().sqrt())
    calls = [call(part, batch=i) for i, part in enumerate(x.split(size))]
    predicted = batch_noise(samples_of(calls, [size] * len(calls)), 0.0)
    assert predicted == pytest.approx(scatter, rel=0.05)


def test_one_sample_has_no_predicted_noise() -> None:
    assert batch_noise(samples(images(1)), 1e-5) is None
