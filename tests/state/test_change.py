"""A change of one bit in any tensor of any dtype is found, with its channel and its size."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from stillnorm.state.change import SwitchChange, TensorChange, changes, tensor_change
from stillnorm.state.record import Recorded

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.complex64,
]


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)


@given(st.sampled_from(DTYPES), st.binary(min_size=32, max_size=32), st.integers(0, 255))
def test_one_flipped_bit_is_found_in_its_channel(dtype: torch.dtype, data: bytes, bit: int) -> None:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    a, b = from_bytes(data, dtype), from_bytes(bytes(flipped), dtype)
    assert tensor_change("bn", "running_mean", a, a.clone()) is None
    change = tensor_change("bn", "running_mean", a, b)
    assert change is not None
    assert (change.changed, change.of) == (1, a.numel())
    assert change.channel == bit // 8 // a.element_size()
    assert str(change)


@given(st.lists(st.floats(width=32), min_size=1, max_size=6), st.data())
def test_the_largest_change_is_named_with_its_size(old: list[float], data: st.DataObject) -> None:
    size = len(old)
    new = data.draw(st.lists(st.floats(width=32), min_size=size, max_size=size))
    assume(all(math.isfinite(x) for x in (*old, *new)))
    change = tensor_change("bn", "weight", torch.tensor(old), torch.tensor(new))
    sizes = [abs(y - x) for x, y in zip(old, new, strict=True)]
    if change is None:
        assert max(sizes) == 0
    else:
        assert change.size == max(sizes)
        assert sizes[change.channel or 0] == max(sizes)
        assert (change.before, change.after) == (old[change.channel], new[change.channel])


@pytest.mark.parametrize(
    ("old", "new", "channel", "size"),
    [
        ([0.0, 1.0], [-0.0, 1.0], 0, 0.0),
        ([0.0, 1.0, 2.0], [-0.0, 1.0, 2.5], 2, 0.5),
        ([1.0, 2.0], [5.0, math.nan], 1, math.nan),
        ([1.0, math.nan], [5.0, 2.0], 1, math.nan),
        ([math.nan, 1.0], [math.nan, 2.0], 1, 1.0),
        ([math.inf, 1.0], [math.inf, 2.0], 1, 1.0),
        ([math.inf, 1.0], [-math.inf, 2.0], 0, math.inf),
        ([1.0, 1.0], [math.inf, 9.0], 0, math.inf),
    ],
)
def test_zeros_infinities_and_nans(
    old: list[float], new: list[float], channel: int, size: float
) -> None:
    change = tensor_change("bn", "bias", torch.tensor(old), torch.tensor(new))
    assert change is not None
    assert change.channel == channel
    assert change.size == pytest.approx(size, nan_ok=True, abs=0)


def test_another_nan_is_a_change_of_bits_only() -> None:
    a = torch.tensor([0x7FC00000, 0x3F800000], dtype=torch.int32).view(torch.float32)
    b = torch.tensor([0x7FC00001, 0x3F800000], dtype=torch.int32).view(torch.float32)
    change = tensor_change("bn", "running_var", a, b)
    assert change is not None
    assert (change.changed, change.channel, change.size) == (1, 0, 0)
    assert str(change) == "running_var[0] nan -> nan, bits only, 1 of 2 channels changed"


def test_counters_are_compared_as_integers() -> None:
    """2**60 and its neighbour are the same float64."""
    change = tensor_change(
        "bn", "num_batches_tracked", torch.tensor(2**60), torch.tensor(2**60 + 1)
    )
    assert change is not None
    assert (change.size, change.channel) == (1, None)
    assert str(change) == f"num_batches_tracked {2**60} -> {2**60 + 1}, by 1"


def test_a_cast_is_told_from_a_change() -> None:
    a = torch.tensor([1.0, 0.1, math.nan])
    exact = tensor_change("bn", "weight", a, a.half())
    assert exact is not None
    assert exact.is_cast
    assert (exact.changed, exact.channel) == (1, 1)
    assert str(exact).startswith("weight[1] float32 -> float16, 0.1 -> 0.09997559, by ")
    moved = tensor_change("bn", "weight", a, (a + 1).half())
    assert moved is not None
    assert not moved.is_cast
    lost = tensor_change("bn", "weight", torch.ones(3), torch.tensor([1, math.nan, 1]).half())
    assert lost is not None
    assert (lost.is_cast, lost.changed, lost.channel) == (False, 1, 1)
    same_values = tensor_change("bn", "weight", torch.ones(3), torch.ones(3).double())
    assert same_values is not None
    assert same_values.is_cast
    assert str(same_values) == "weight float32 -> float64"


def test_shapes_and_missing_tensors() -> None:
    a = torch.ones(3)
    assert str(tensor_change("bn", "weight", a, torch.ones(4))) == "weight shape (3,) -> (4,)"
    assert str(tensor_change("bn", "weight", a, None)) == "weight gone"
    assert str(tensor_change("bn", "weight", None, a)) == "weight new"
    assert tensor_change("bn", "weight", torch.ones(0), torch.ones(0)) is None


def test_changes_of_a_layer_are_its_tensors_then_its_switches() -> None:
    before = Recorded(("bn",), {"weight": torch.ones(2)}, {"momentum": 0.1, "eps": 1e-5})
    after = Recorded(("bn",), {"weight": torch.zeros(2)}, {"momentum": None, "eps": 1e-5})
    found = list(changes(before, after, "bn"))
    assert [type(change) for change in found] == [TensorChange, SwitchChange]
    assert str(found[1]) == "momentum 0.1 -> None"
