"""One thing that changed in a norm layer: a tensor, by its bits, or a switch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stillnorm.norms import same_bits
from stillnorm.reports.numbers import short
from stillnorm.state.record import Recorded, Switch


@dataclass(frozen=True)
class TensorChange:
    """A tensor whose bits, shape or dtype are not what they were.

    Args:
        path: The layer.
        tensor: ``weight``, ``bias``, ``running_mean``, ``running_var``, ``num_batches_tracked``, or
            another that `Recorded` names.
        changed: The number of channels that changed.
        of: The number of channels.
        channel: The channel that changed most; None for a tensor without channels.
        before: The value there before, or None.
        after: The value there after, or None.
        size: The size of that change; 0 when only the bits changed (0 and -0, two NaNs).
        note: What numbers do not say: ``shape (4,) -> (8,)``, ``float32 -> float16``, ``gone``.
        is_cast: The tensor is exactly the cast of what it was to another dtype.
    """

    path: str
    tensor: str
    changed: int = 0
    of: int = 0
    channel: int | None = None
    before: float | None = None
    after: float | None = None
    size: float | None = None
    note: str = ""
    is_cast: bool = False

    def __str__(self) -> str:
        name = self.tensor if self.channel is None else f"{self.tensor}[{self.channel}]"
        parts = [self.note] if self.note else []
        if self.size is not None:
            by = f"by {short(self.size)}" if self.size else "bits only"
            parts.append(f"{figure(self.before)} -> {figure(self.after)}, {by}")
        if self.channel is not None:
            parts.append(f"{self.changed} of {self.of} channels changed")
        return f"{name} {', '.join(parts)}"


@dataclass(frozen=True)
class SwitchChange:
    """A switch that is not what it was.

    Args:
        path: The layer.
        switch: ``kind``, ``training``, ``momentum``, ``eps``, ``track_running_stats``,
            ``weight.requires_grad``, ``bias.requires_grad``, ``held``, or of a layer of Keras
            ``trainable``.
        before: The value before.
        after: The value after.
    """

    path: str
    switch: str
    before: Switch
    after: Switch

    def __str__(self) -> str:
        return f"{self.switch} {self.before} -> {self.after}"


Change = TensorChange | SwitchChange


def changes(before: Recorded, after: Recorded, path: str) -> Iterator[Change]:
    """Yield what changed in one layer: tensors first, then switches."""
    for name in dict.fromkeys((*before.tensors, *after.tensors)):
        change = tensor_change(path, name, before.tensors.get(name), after.tensors.get(name))
        if change is not None:
            yield change
    for switch, value in before.switches.items():
        now = after.switches.get(switch, value)
        if now != value:
            yield SwitchChange(path, switch, value, now)


def tensor_change(path: str, name: str, a: Tensor | None, b: Tensor | None) -> TensorChange | None:
    """Return how tensor b differs from tensor a, or None when every bit is the same.

    Example:
        >>> a = torch.tensor([0.0, 1.0, 2.0])
        >>> b = torch.tensor([-0.0, 1.0, 2.5])
        >>> print(tensor_change("bn", "running_mean", a, b))
        running_mean[2] 2 -> 2.5, by 0.5, 2 of 3 channels changed
    """
    if a is None or b is None:
        return TensorChange(path, name, note="gone" if b is None else "new")
    if a.shape != b.shape:
        return TensorChange(path, name, note=f"shape {tuple(a.shape)} -> {tuple(b.shape)}")
    if same_bits(a, b):
        return None
    cast = a.dtype != b.dtype
    sizes = _sizes(a, b)
    differs = sizes > 0 if cast else (_bits(a) != _bits(b)).any(1)  # (C,)
    at = int(sizes.where(differs, -1).argmax()) if bool(differs.any()) else None
    old, new = (None, None) if at is None else (_item(a, at), _item(b, at))
    return TensorChange(
        path,
        name,
        changed=int(differs.sum()),
        of=differs.numel(),
        channel=at if a.dim() else None,
        before=old,
        after=new,
        size=None if old is None or new is None else _size(old, new),
        note=f"{_name(a.dtype)} -> {_name(b.dtype)}" if cast else "",
        is_cast=cast and same_bits(a.to(b.dtype), b),
    )


def _bits(tensor: Tensor) -> Tensor:
    """Return the bytes of each channel, (C, bytes)."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def _sizes(a: Tensor, b: Tensor) -> Tensor:
    """Return how far each channel moved, (C,): infinitely far to and from NaN."""
    a, b = (t.abs() if t.is_complex() else t for t in (a, b))
    a, b = (t.reshape(-1).to(torch.float64) for t in (a, b))
    same = (a == b) | (a.isnan() & b.isnan())
    return (b - a).abs().nan_to_num(nan=torch.inf).where(~same, 0)


def _item(tensor: Tensor, channel: int) -> float:
    value = tensor.reshape(-1)[channel].item()
    return abs(value) if isinstance(value, complex) else value


def _size(old: float, new: float) -> float:
    """Return |new - old|, of integers exactly; 0 between two NaNs."""
    return 0 if math.isnan(old) and math.isnan(new) else abs(new - old)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def figure(x: float | None) -> str:
    """Write a value with the digits that a float32 has, a count in full."""
    if x is None:
        return ""
    return str(x) if isinstance(x, int) else f"{x:.7g}"
