"""Keeping the values of tensors: the same object, the same bits, the same version counter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from stillnorm.norms.undo import undisturbed

_version_kept = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]


@contextlib.contextmanager
def keep_tensors(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put the values of `tensors` back after the block, in place, where they have changed.

    The version counter goes back too: a graph recorded before the block still finds the values it
    saved and may run backward.

    Args:
        tensors: Any tensors. Meta and uninitialised ones have no value to keep; sparse, nested and
            quantized ones are left to whoever writes them.

    Cost:
        One copy of each tensor.
    """
    kept = [
        (tensor, tensor.data, tensor.detach().clone())
        for tensor in _unique(tensors)
        if not tensor.is_meta and _is_dense(tensor)
    ]
    with contextlib.ExitStack() as versions:
        for tensor, _, _ in kept:
            if not tensor.is_inference():
                versions.enter_context(_version_kept(tensor))
        try:
            yield
        finally:
            with undisturbed():
                for tensor, data, value in kept:
                    if _layout(tensor) != _layout(data) or tensor.data_ptr() != data.data_ptr():
                        tensor.data = data
                    if not same_bits(tensor, value):
                        write(tensor, value)


@contextlib.contextmanager
def keep_types(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Undo casts and moves of `tensors` after the block: the same storage is back, unrounded.

    What was written in place meanwhile stays.

    Cost:
        None, unless there was a cast: then both storages live until the block ends.
    """
    kept = [(tensor, tensor.data) for tensor in _unique(tensors)]
    try:
        yield
    finally:
        for tensor, data in kept:
            if (tensor.dtype, tensor.device) != (data.dtype, data.device):
                tensor.data = data


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have the same shape, dtype and bits; NaN equals the same NaN."""
    if _layout(a) != _layout(b):
        return False
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def write(tensor: Tensor, value: Tensor) -> None:
    """Copy `value` into `tensor` in place, whatever mode `tensor` was made in."""
    mode = torch.inference_mode() if tensor.is_inference() else torch.no_grad()
    with mode:
        tensor.copy_(value)


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the tensors that have a value or could have one, each object once."""
    lazy = UninitializedParameter | UninitializedBuffer
    return list({id(t): t for t in tensors if not isinstance(t, lazy)}.values())


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not (tensor.is_nested or tensor.is_quantized)


def _layout(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device
