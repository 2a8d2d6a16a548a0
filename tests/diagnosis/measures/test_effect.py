"""The effect is unbiased, and the sign-flip test is right about how often noise does it."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillnorm.diagnosis.measures.effect import EXACT_UP_TO, effect, sign_flip_p


def normal(n: int, channels: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return mean + torch.randn(n, channels, generator=g, dtype=torch.float64)


def test_effect_is_the_double_sum_over_different_samples() -> None:
    d = normal(7, 5, seed=0, mean=1.0)
    pairs = [d[i] @ d[j] for i, j in product(range(7), repeat=2) if i != j]
    expected = (sum(float(p) for p in pairs) / (7 * 6 * 5)) ** 0.5
    assert effect(d) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [8, 64])
def test_effect_has_no_noise_floor(n: int) -> None:
    """The plain norm of the mean is 1/sqrt(n) for pure noise; the effect does not know n."""
    plain = [float(normal(n, 64, seed).mean(0).square().mean().sqrt()) for seed in range(50)]
    unbiased = [effect(normal(n, 64, seed)) for seed in range(50)]
    assert sum(plain) / 50 == pytest.approx(n**-0.5, rel=0.1)
    assert sum(unbiased) / 50 < 0.35 * n**-0.5


def test_effect_finds_the_true_size() -> None:
    sizes = [effect(normal(64, 32, seed, mean=0.3)) for seed in range(20)]
    assert sum(sizes) / 20 == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("n", [2, 5, EXACT_UP_TO])
def test_p_of_few_samples_is_exact(n: int) -> None:
    d = normal(n, 3, seed=n, mean=0.3)
    observed = d.sum(0).square().sum()
    as_large = 0
    for pattern in product((1.0, -1.0), repeat=n):
        flipped = torch.tensor(pattern, dtype=torch.float64) @ d
        as_large += int(flipped.square().sum() >= observed - 1e-9)
    assert sign_flip_p(d) == pytest.approx(as_large / 2**n)


@pytest.mark.parametrize("n", [10, 32])
def test_p_is_uniform_without_a_difference(n: int) -> None:
    p = torch.tensor([sign_flip_p(normal(n, 4, seed)) for seed in range(300)])
    for level in (0.05, 0.2, 0.5):
        expected_se = (level * (1 - level) / 300) ** 0.5
        assert abs(float((p <= level).double().mean()) - level) < 4 * expected_se


def test_p_is_small_with_one() -> None:
    assert sign_flip_p(normal(32, 8, seed=0, mean=1.0)) == pytest.approx(1 / 2000)


def test_more_samples_than_needed_are_thinned_over_all_of_them() -> None:
    """A fault in the second half only must be seen."""
    d = torch.cat([normal(400, 4, seed=0), normal(400, 4, seed=1, mean=1.0)])
    assert sign_flip_p(d) < 0.002


def test_the_global_generator_is_not_touched() -> None:
    before = torch.random.get_rng_state()
    sign_flip_p(normal(40, 2, seed=0))
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_samples_say_nothing(n: int) -> None:
    d = normal(n, 4, seed=0, mean=9.0)
    assert (effect(d), sign_flip_p(d)) == (0.0, 1.0)


@given(st.integers(2, 30), st.integers(1, 6), st.integers(0, 10_000), st.floats(0.01, 100))
def test_scale_and_sign_do_not_matter(n: int, channels: int, seed: int, scale: float) -> None:
    d = normal(n, channels, seed, mean=0.5)
    assert effect(-scale * d) == pytest.approx(scale * effect(d), rel=1e-9)
    assert sign_flip_p(-scale * d) == sign_flip_p(d)
