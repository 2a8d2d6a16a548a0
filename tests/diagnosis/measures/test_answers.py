"""Comparing answers: which axis is the samples', what is a difference and what rounding."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stillnorm.diagnosis.measures.answers import Comparison, agree, compare

HALF = (0, 1)


def against(whole: object, part: object, places: tuple[int, ...] = HALF, n: int = 4) -> Comparison:
    return compare(whole, part, places, n)


def test_the_distance_is_in_spreads_of_the_whole() -> None:
    whole = torch.randn(4, 6, dtype=torch.float64)
    part = whole[:2].clone()
    part[1, 3] += 0.5
    seen = against(whole, part)
    spread = float(whole.std())
    assert seen.changed == (1,)
    assert seen.parts[0].off.tolist() == [0, pytest.approx(0.5 / math.sqrt(6) / spread)]
    assert seen.moved == pytest.approx(0.5 / math.sqrt(12) / spread)
    assert seen.beyond(1e9) == ()


@given(n=st.integers(2, 9), data=st.data())
def test_samples_are_named_by_their_places_in_any_order(n: int, data: st.DataObject) -> None:
    places = data.draw(st.permutations(range(n)))[: data.draw(st.integers(1, n - 1))]
    wrong = data.draw(st.integers(0, len(places) - 1))
    whole = torch.arange(3.0 * n).reshape(n, 3)
    part = whole[places].clone()
    assert compare(whole, part, places, n).changed == ()
    part[wrong] += 1
    assert compare(whole, part, places, n).changed == (places[wrong],)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_samples_axis_is_the_one_whose_length_differs(axis: int) -> None:
    whole = torch.randn(4, 4, 4)
    part = whole.narrow(axis, 0, 2).clone()
    assert against(whole, part).changed == ()
    part.select(axis, 1).add_(1)
    assert against(whole, part).changed == (1,)


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        (torch.zeros(()), torch.ones(())),  # a mean over the batch
        (torch.zeros(4, 3), torch.ones(2, 4)),
        (torch.zeros(8, 3), torch.ones(4, 3)),  # two rows a sample, in whatever order
        (torch.zeros(4, 4), torch.ones(2, 2)),
        (torch.zeros(4), torch.ones(2, 1)),
        ([1.0, 2.0], [1.0, 3.0]),
        (0.5, 0.6),
        ("a", "b"),
        (None, None),
        ({"a": torch.zeros(4)}, {"b": torch.ones(2)}),
        (torch.zeros(4), [1.0, 1.0]),
    ],
)
def test_what_belongs_to_no_sample_is_not_compared(whole: object, part: object) -> None:
    seen = against(whole, part)
    assert (seen.parts, seen.changed, seen.moved) == ((), (), None)


@pytest.mark.parametrize(
    ("whole", "part"),
    [
        (torch.tensor([1, 2, 3, 4]), torch.tensor([1, 3])),
        (torch.tensor([True] * 4), torch.tensor([True, False])),
        (np.array([1, 2, 3, 4], dtype=np.uint16), np.array([1, 3], dtype=np.uint16)),
        (np.array(["cat"] * 4), np.array(["cat", "dog"])),
        (["cat"] * 4, ["cat", "dog"]),
        ([1, 2, 3, 4], [1, 3]),
        ([[1], [1, 2], [], []], [[1], [1]]),
        ([{"a": 1}, {"a": 2}, {}, {}], [{"a": 1}, {"a": 3}]),
        ([torch.zeros(1), torch.zeros(2), 0, 0], [torch.zeros(1), torch.zeros(3)]),
        ([1.0, 2.0, 3.0, 4.0], [1.0, None]),
    ],
)
def test_another_label_or_shape_is_infinitely_far(whole: object, part: object) -> None:
    seen = against(whole, part)
    assert seen.changed == (1,)
    assert seen.beyond(1e9) == (1,)


class TestRounding:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_a_few_units_in_the_last_place_are_noise(self, dtype: torch.dtype) -> None:
        whole = (100 + torch.randn(4, 50)).to(dtype)
        part = whole[:2] * (1 + 2 * torch.finfo(dtype).eps)
        assert not torch.equal(part, whole[:2])
        assert against(whole, part).changed == ()
        assert against(whole, 1.5 * whole[:2]).changed == HALF

    @pytest.mark.parametrize("value", [0.0, 1.0, -1e6])
    def test_a_constant_has_no_spread(self, value: float) -> None:
        whole = torch.full((4, 3), value)
        assert against(whole, whole[:2].clone()).changed == ()
        assert against(whole, whole[:2] * (1 + 1e-7)).changed == ()
        assert against(whole, whole[:2] + 0.1 * max(1, abs(value))).changed == HALF

    def test_what_is_no_number_in_both_is_the_same(self) -> None:
        whole = torch.tensor([[math.nan, 1], [math.inf, 2], [0, 0], [1, 1]])
        assert against(whole, whole[:2].clone()).changed == ()
        part = torch.tensor([[0.0, 1], [-math.inf, 2]])
        assert against(whole, part).changed == HALF
        assert against(torch.full((4,), math.nan), torch.zeros(2)).changed == HALF

    def test_complex_numbers(self) -> None:
        whole = torch.randn(4, 3, dtype=torch.complex64)
        assert against(whole, whole[:2].clone()).changed == ()
        assert against(whole, whole[:2].conj()).changed == HALF


def test_the_spread_is_that_of_all_samples_also_where_one_is_asked_for() -> None:
    whole = [1.0, 2.0, 3.0, 4.0]
    assert against(whole, [3 + 1e-6], (2,)).changed == ()
    assert against([{"score": x} for x in whole], [{"score": 3.1}], (2,)).changed == (2,)


def test_agreement_is_of_everything() -> None:
    answer = {"boxes": [torch.ones(2, 4), torch.ones(0, 4)], "mean": 0.5, "name": "a"}
    assert agree(answer, copy.deepcopy(answer))
    for key, other in {"boxes": [torch.ones(2, 4)], "mean": 0.6, "name": "b"}.items():
        assert not agree(answer, answer | {key: other})


def test_the_worst_part_counts() -> None:
    whole = {"a": torch.randn(4), "b": (torch.arange(4), torch.randn(4, 2))}
    part = {"a": whole["a"][:2], "b": (torch.tensor([0, 9]), whole["b"][1][:2] + 1)}
    seen = against(whole, part)
    assert seen.changed == HALF
    assert seen.moved == pytest.approx(1 / float(whole["b"][1].std()), rel=1e-6)


def test_an_object_that_leads_back_to_itself() -> None:
    class Output:
        def __init__(self, logits: torch.Tensor) -> None:
            self.logits, self.me = logits, self

    whole = torch.randn(4)
    assert against(Output(whole), Output(whole[:2] + 1)).changed == HALF
