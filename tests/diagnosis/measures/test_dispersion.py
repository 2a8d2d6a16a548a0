"""How batches differ: beyond chance or not, in groups or in order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stillnorm.diagnosis.measures.dispersion import dispersion


def rows(n: int = 128, channels: int = 8, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, channels, generator=g, dtype=torch.float64) / channels**0.5


def shifted(shifts: list[float], size: int = 16, seed: int = 0) -> Tensor:
    """Batches whose rows are moved by so many deviations."""
    x = rows(size * len(shifts), seed=seed)
    by = torch.tensor(shifts, dtype=torch.float64).repeat_interleave(size).unsqueeze(1)
    return x + by / x.shape[1] ** 0.5


def test_the_size_is_the_scatter_of_the_batches_without_bias() -> None:
    shifts = torch.tensor([1.0, -1.0] * 4) * 0.5
    of_seeds = [dispersion([shifted(shifts.tolist(), 8, s)], [8] * 8).size for s in range(30)]
    assert sum(of_seeds) / 30 == pytest.approx(float(shifts.std()), rel=0.05)


def test_the_ratio_is_one_for_batches_drawn_at_random() -> None:
    ratios = [dispersion([rows(seed=s)], [16] * 8).ratio for s in range(30)]
    assert sum(ratios) / 30 == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("draw", ["normal", "heavy"])
def test_the_test_keeps_its_level(draw: str) -> None:
    """Under the null one draw in five has p < 0.2 at most, heavy tails or not; of 60, twelve."""
    small = 0
    for seed in range(60):
        blocks = [rows(48, 4, seed), rows(48, 2, 1000 + seed)]
        if draw == "heavy":
            blocks = [x.exp().square() for x in blocks]
        small += dispersion(blocks, [4] * 12).p < 0.2
    assert 2 <= small <= 21


def test_a_block_that_differs_is_named_among_many_that_do_not() -> None:
    blocks = [rows(seed=s) for s in range(10)]
    blocks[6] = shifted([0, 1, 0, 1, 0, 1, 0, 1])
    found = dispersion(blocks, [16] * 8)
    assert found.block == 6
    assert found.is_real
    assert found.groups == ((0, 2, 4, 6), (1, 3, 5, 7))


@pytest.mark.parametrize(
    ("shifts", "groups"),
    [
        ([0, 2, 0, 2], ((0, 2), (1, 3))),
        ([0, 0, 2, 2, 0, 2], ((0, 1, 4), (2, 3, 5))),
        ([0, 2, 4, 0, 2, 4], ((0, 3), (1, 4), (2, 5))),
        ([0, 0, 0, 2, 2, 2], None),  # sorted by domain
        ([0, 0, 2, 2, 4, 4], None),
        ([0, 0.5, 1, 1.5, 2, 2.5], None),  # a drift
        ([0, 1, 2, 3, 2, 1, 0], None),  # there and back
        ([0, 0, 3, 0, 0, 0], None),  # one batch unlike the rest
        ([0, 3, 5, 1, 4, 2], None),  # each from a source of its own
    ],
)
def test_groups_that_take_turns_are_told_from_all_else(
    shifts: list[float], groups: tuple[tuple[int, ...], ...] | None
) -> None:
    found = dispersion([shifted(shifts)], [16] * len(shifts))
    assert found.is_real
    assert found.pattern == ("order" if groups is None else "groups")
    if groups is not None:
        assert found.groups == groups


def test_successive_batches_of_a_drift_are_alike() -> None:
    assert dispersion([shifted([0, 0.5, 1, 1.5, 2, 2.5])], [16] * 6).neighbours < 0.3
    assert dispersion([shifted([0, 2, 0, 2, 0, 2])], [16] * 6).neighbours > 1


def test_batches_of_different_sizes() -> None:
    sizes = [40, 2, 16, 20, 7]
    assert not dispersion([rows(sum(sizes))], sizes).is_real
    by = torch.cat([torch.full((n, 1), float(i)) for i, n in enumerate(sizes)])
    assert dispersion([rows(sum(sizes)) + by], sizes).is_real


def test_many_samples_are_cut_to_the_first_of_each_batch() -> None:
    assert dispersion([shifted([0, 1] * 4, size=200)], [200] * 8).is_real


def test_rows_that_are_all_the_same() -> None:
    assert not dispersion([torch.zeros(32, 3)], [8] * 4).is_real
    by_batch = torch.tensor([0.0, 1, 0, 1]).repeat_interleave(8).unsqueeze(1)
    assert dispersion([by_batch], [8] * 4).is_real


def test_it_is_the_same_every_time_and_draws_nothing() -> None:
    before = torch.get_rng_state()
    assert dispersion([rows()], [16] * 8) == dispersion([rows()], [16] * 8)
    assert torch.equal(before, torch.get_rng_state())
