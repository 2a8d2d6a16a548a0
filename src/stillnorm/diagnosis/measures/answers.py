"""Comparing the answers that the same samples get in a whole batch and in a part of it.

Answers can be anything with a part for each sample: a tensor, an array, mappings, sequences and
objects of them, a list with one item per sample. The part is always smaller than the whole, so that
the axis of the samples is the one whose length differs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

# In spreads of the answers: far above what another batch size does to the rounding of a convolution
# in float32. In lower precisions so many units in the last place of the largest answer are noise.
NOISE = 1e-3
ROUNDING = 8


@dataclass(frozen=True, eq=False)
class Comparison:
    """How far some samples' answers are from those that they had in the whole batch.

    Args:
        places: The samples' places in the whole batch.
        parts: What the answers consist of; none when nothing in them belongs to one sample.
    """

    places: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def moved(self) -> float | None:
        """By how much the part that moved most did, in its spreads; None without numbers."""
        return max((part.moved for part in self.parts if part.inexact), default=None)

    @cached_property
    def changed(self) -> tuple[int, ...]:
        """The places of the samples whose answer changed by more than rounding explains."""
        return self.beyond(None)

    def beyond(self, tolerance: float | None) -> tuple[int, ...]:
        """Return the places of the samples whose answer moved by more than a tolerance.

        Args:
            tolerance: In spreads; None for what rounding explains.
        """
        far = torch.zeros(len(self.places), dtype=torch.bool)
        for part in self.parts:
            far |= part.off > (part.noise if tolerance is None else tolerance)
        return tuple(self.places[i] for i in far.nonzero().flatten().tolist())


@dataclass(frozen=True, eq=False)
class Part:
    """One tensor of the answers, or one item of each sample's.

    Args:
        off: Per sample: how far it moved, in standard deviations of the whole; infinite where it is
            another thing altogether: another shape, another label, a number that was none.
        noise: What rounding explains.
        inexact: Whether it is of floating point.

    Shape:
        - off: ``(k,)``, float64
    """

    off: Tensor
    noise: float
    inexact: bool

    @property
    def moved(self) -> float:
        """The root mean square over the samples."""
        return float(self.off.square().mean().sqrt())


def compare(whole: object, part: object, places: Sequence[int], size: int) -> Comparison:
    """Compare the answers to a part of a batch with those that the same samples had in the whole.

    Args:
        whole: The answers to the whole batch.
        part: The answers to the part.
        places: The places of the part's samples in the whole, fewer than `size`.
        size: The number of samples in the whole batch.

    Example:
        >>> x = torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> compare(x, torch.tensor([3.0, 0.5]), (3, 0), 4).changed
        (0,)
    """
    places = tuple(places)
    return Comparison(places, tuple(_parts(_plain(whole), _plain(part), places, size)))


def agree(a: object, b: object) -> bool:
    """Tell whether two answers to the same batch are the same but for rounding.

    Example:
        >>> agree({"y": torch.ones(3)}, {"y": torch.ones(3)}), agree([1, 2], [1, 3])
        (True, False)
    """
    return not Comparison((0,), tuple(_of_items([_plain(a)], (0,), [_plain(b)]))).changed


def _parts(whole: object, part: object, places: tuple[int, ...], n: int) -> Iterator[Part]:
    k = len(places)
    if isinstance(whole, Tensor) and isinstance(part, Tensor):
        if (axis := _sample_axis(whole.shape, part.shape, n, k)) is not None:
            rows = whole.movedim(axis, 0)
            yield _of_tensors(rows, [rows[i] for i in places], list(part.movedim(axis, 0)))
    elif isinstance(whole, dict) and isinstance(part, dict):
        for key in whole.keys() & part.keys():
            yield from _parts(whole[key], part[key], places, n)
    elif isinstance(whole, list) and isinstance(part, list):
        if len(whole) == len(part):
            for a, b in zip(whole, part, strict=True):
                yield from _parts(a, b, places, n)
        elif (len(whole), len(part)) == (n, k):
            yield from _of_items(whole, places, part)


def _sample_axis(whole: torch.Size, part: torch.Size, n: int, k: int) -> int | None:
    """Return the axis that is n long in one and k in the other, all others being equal."""
    if len(whole) != len(part):
        return None
    differing = [i for i, (a, b) in enumerate(zip(whole, part, strict=True)) if a != b]
    fits = len(differing) == 1 and (whole[differing[0]], part[differing[0]]) == (n, k)
    return differing[0] if fits else None


def _of_items(every: list[object], places: Sequence[int], part: list[object]) -> Iterator[Part]:
    """Compare answers with one item per sample, each of them whatever it is."""
    whole = [list(_leaves(item)) for item in every]
    a, b = [whole[i] for i in places], [list(_leaves(item)) for item in part]
    yield _exact([len(x) == len(y) for x, y in zip(a, b, strict=True)])
    for slot in range(min(map(len, (*a, *b)))):
        x, y = ([leaves[slot] for leaves in items] for items in (a, b))
        tensors = [leaf for leaf in (*x, *y) if isinstance(leaf, Tensor)]
        if len(tensors) == 2 * len(x):
            like = [leaf for leaves in whole for leaf in leaves[slot : slot + 1]]
            numbers = [leaf.flatten() for leaf in like if isinstance(leaf, Tensor)]
            yield _of_tensors(torch.cat(numbers), tensors[: len(x)], tensors[len(x) :])
        else:
            yield _exact([_same(p, q) for p, q in zip(x, y, strict=True)])


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a.cpu(), b.cpu())
    return type(a) is type(b) and a == b


def _exact(same: Sequence[bool]) -> Part:
    return Part(torch.tensor([0.0 if s else math.inf for s in same]).double(), 0.0, False)


def _of_tensors(whole: Tensor, a: list[Tensor], b: list[Tensor]) -> Part:
    """Compare tensors in pairs, in units of the spread of the whole."""
    if not (whole.is_floating_point() or whole.is_complex()):
        return _exact([_same(x, y) for x, y in zip(a, b, strict=True)])
    finite = _double(whole)[_double(whole).isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    spread = float(finite.std()) if finite.numel() > 1 else 0.0
    spread = max(spread, 1e-12 * largest, 1e-30)  # of a constant, something to divide by
    noise = max(NOISE, ROUNDING * torch.finfo(whole.dtype).eps * largest / spread)
    off = [_distance(_double(x), _double(y)) / spread for x, y in zip(a, b, strict=True)]
    return Part(torch.tensor(off).double(), noise, True)


def _distance(a: Tensor, b: Tensor) -> float:
    """Return the root mean square difference; infinite where shapes or what is finite differ."""
    if a.shape != b.shape:
        return math.inf
    same = (a == b) | (a.isnan() & b.isnan())
    difference = (a - b).abs().nan_to_num(nan=math.inf, posinf=math.inf).where(~same, 0)
    return float(difference.square().mean().sqrt()) if difference.numel() else 0.0


def _double(tensor: Tensor) -> Tensor:
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return tensor.detach().cpu().double()


def _plain(value: Any, above: tuple[int, ...] = ()) -> object:
    """Return answers as tensors, lists and dicts of them, and what is none of these as it is.

    Attributes of objects count as items; what leads back to itself ends there.
    """
    if isinstance(value, Tensor | str | bytes | bool | type | None) or id(value) in above:
        return value
    if type(value).__module__ == "numpy" and hasattr(value, "dtype"):
        if value.dtype.kind in "biufc":
            return torch.as_tensor(value.copy())
        return _plain(value.tolist(), above)
    if isinstance(value, float | complex):
        return torch.tensor(value, dtype=torch.promote_types(torch.float64, _kind(value)))
    above = (*above, id(value))
    if isinstance(value, Mapping):
        return {key: _plain(item, above) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, above) for item in value]
    if hasattr(value, "__dict__"):
        return {key: _plain(item, above) for key, item in vars(value).items()}
    return value


def _kind(value: float | complex) -> torch.dtype:
    return torch.complex64 if isinstance(value, complex) else torch.float32


def _leaves(value: object) -> Iterator[object]:
    """Yield what one sample's answer consists of."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    else:
        yield value
