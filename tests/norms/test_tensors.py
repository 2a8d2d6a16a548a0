"""Keeping tensors: objects, bits and version counters are as before, whatever was done to them."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stillnorm.norms import keep_tensors, keep_types, same_bits, tensors, write

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def from_bytes(data: bytes, dtype: torch.dtype) -> Tensor:
    """Every pattern of bits, NaNs with payloads included; of bool both there are."""
    raw = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return raw.bool() if dtype is torch.bool else raw.view(dtype)


def observed(tensor: Tensor) -> tuple[object, ...]:
    raw = tensor.detach().clone().reshape(-1).view(torch.uint8).tolist()
    return id(tensor), tensor.dtype, tensor.shape, tensor.data_ptr(), tensor._version, raw


# ------------------------------------------------------------------------------------ same_bits


@given(st.sampled_from(DTYPES), st.binary(min_size=16, max_size=16), st.integers(0, 127))
def test_same_bits_tells_one_flipped_bit(dtype: torch.dtype, data: bytes, bit: int) -> None:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    a, b = from_bytes(data, dtype), from_bytes(bytes(flipped), dtype)
    assert same_bits(a, a.clone())
    if dtype is not torch.bool or a.tolist() != b.tolist():
        assert not same_bits(a, b)


def test_same_bits_knows_zeros_and_nans_apart() -> None:
    nan = from_bytes(bytes([0, 0, 0xC0, 0x7F]), torch.float32)
    other = from_bytes(bytes([1, 0, 0xC0, 0x7F]), torch.float32)
    assert nan.isnan().all()
    assert other.isnan().all()
    assert same_bits(nan, nan.clone())
    assert not same_bits(nan, other)
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))


def test_same_bits_compares_shape_and_dtype_too() -> None:
    zeros = torch.zeros(4)
    assert not same_bits(zeros, torch.zeros(2, 2))
    assert not same_bits(zeros, torch.zeros(4, dtype=torch.int32))
    assert same_bits(torch.zeros(0), torch.zeros(0))
    assert same_bits(torch.tensor(3), torch.tensor(3))
    assert not same_bits(torch.tensor(3), torch.tensor(4))


def test_same_bits_does_not_mind_memory_format_or_gradients() -> None:
    x = torch.randn(2, 3, 4, 5, requires_grad=True)
    assert same_bits(x, x.to(memory_format=torch.channels_last))
    assert same_bits(x[:, 1], x[:, 1].contiguous())


# --------------------------------------------------------------------------------- keep_tensors

CHANGES: dict[str, Callable[[Tensor], object]] = {
    "nothing": lambda t: None,
    "written": lambda t: t.fill_(3),
    "written and taken back": lambda t: (t.add_(1), t.sub_(1)),
    "one bit": lambda t: t.view(torch.int32).bitwise_xor_(1),
    "NaN": lambda t: t.fill_(torch.nan),
    "data written": lambda t: t.data.fill_(3),
    "data replaced": lambda t: setattr(t, "data", torch.ones(4)),
    "other shape": lambda t: setattr(t, "data", torch.ones(9)),
    "other dtype": lambda t: setattr(t, "data", t.data.half()),
    "past torch": lambda t: t.detach().numpy().__setitem__(0, 7),
}


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", CHANGES)
def test_keep_tensors_puts_everything_back(name: str, error: type[BaseException] | None) -> None:
    kept, other = torch.randn(4), torch.randn(4)
    before = observed(kept)
    with contextlib.suppress(ValueError, KeyboardInterrupt), keep_tensors([other, kept, kept]):
        CHANGES[name](kept)
        if error is not None:
            raise error
    assert observed(kept) == before


@given(st.binary(min_size=16, max_size=16), st.sampled_from(DTYPES))
def test_keep_tensors_keeps_every_bit(data: bytes, dtype: torch.dtype) -> None:
    kept = from_bytes(data, dtype).clone()
    before = observed(kept)
    with keep_tensors([kept]):
        kept.zero_()
    assert observed(kept) == before


def test_keep_tensors_keeps_a_recorded_graph_usable() -> None:
    weight, x = torch.randn(3), torch.randn(3, requires_grad=True)
    loss = (weight * x).sum()  # saves weight
    with keep_tensors([weight]):
        weight.fill_(5)
    loss.backward()
    assert torch.equal(x.grad, weight)


def test_a_graph_recorded_on_values_that_are_gone_fails_loudly() -> None:
    weight, x = torch.randn(3), torch.randn(3, requires_grad=True)
    with keep_tensors([weight]):
        weight.fill_(5)
        loss = (weight * x).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_keep_tensors_takes_tensors_without_values() -> None:
    meta, lazy = torch.empty(3, device="meta"), torch.nn.UninitializedBuffer()
    with keep_tensors([meta, lazy]):
        lazy.materialize((2,))
    assert lazy.shape == (2,)


def test_keep_tensors_takes_inference_tensors_and_parameters() -> None:
    with torch.inference_mode():
        inferred = torch.randn(3)
    parameter = torch.nn.Parameter(torch.randn(3))
    before = inferred.tolist(), observed(parameter)
    with keep_tensors([inferred, parameter]):
        with torch.inference_mode():
            inferred.zero_()
        with torch.no_grad():
            parameter.zero_()
    assert (inferred.tolist(), observed(parameter)) == before


# ----------------------------------------------------------------------------------- keep_types


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_keep_types_takes_casts_back_unrounded(dtype: torch.dtype) -> None:
    linear = torch.nn.Linear(3, 3)
    before = [observed(p) for p in linear.parameters()]
    with contextlib.suppress(KeyboardInterrupt), keep_types(linear.parameters()):
        linear.to(dtype)
        raise KeyboardInterrupt
    assert [observed(p) for p in linear.parameters()] == before


def test_keep_types_lets_writes_stay() -> None:
    tensor = torch.zeros(3)
    with keep_types([tensor]):
        tensor.fill_(2)
    assert tensor.tolist() == [2, 2, 2]


# ---------------------------------------------------------------------------------------- write


def test_write_is_in_place_and_asks_no_gradient() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    pointer = parameter.data_ptr()
    write(parameter, torch.ones(3))
    assert parameter.tolist() == [1, 1, 1]
    assert parameter.data_ptr() == pointer
    assert parameter.is_leaf
    assert parameter.requires_grad


def test_ctrl_c_on_the_way_back_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is raised, once every tensor has its value again."""
    kept = [torch.zeros(3) for _ in range(4)]
    real = tensors.write

    def write(tensor: torch.Tensor, value: torch.Tensor) -> None:
        signal.raise_signal(signal.SIGINT)
        real(tensor, value)

    monkeypatch.setattr(tensors, "write", write)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), keep_tensors(kept):
        torch._foreach_add_(kept, 1)
    assert all(map(torch.equal, kept, [torch.zeros(3)] * 4))
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_nothing_is_done_about_signals() -> None:
    tensor = torch.zeros(3)

    def change() -> None:
        with keep_tensors([tensor]):
            tensor.add_(1)

    thread = threading.Thread(target=change)
    thread.start()
    thread.join()
    assert torch.equal(tensor, torch.zeros(3))
