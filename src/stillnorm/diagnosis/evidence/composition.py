"""Does a sample's answer depend on its batch mates? Ask again without them, and compare."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from stillnorm.diagnosis.measures.answers import compare
from stillnorm.state import eval_mode, preserved
from stillnorm.tracing import batch_size, call, copied, strangers_kept

if TYPE_CHECKING:
    from stillnorm.diagnosis.evidence import Evidence


def batch_dependence(evidence: Evidence) -> float | None:
    """Run the first batch whole and its first half alone, in eval mode; compare the shared samples.

    Returns:
        The root mean square difference, in standard deviations of the output; None where that
        cannot be measured: no batch, a batch of one, an output without a part for each sample, or
        a model that cannot take half a batch.
    """
    if evidence.runs is None:
        return None
    model, forward = evidence.model, evidence.runs.forward
    batch = evidence.runs.batches[0]
    size = samples_in(batch)
    half = range(size // 2)
    if not half:
        return None
    with preserved(model), strangers_kept(model), torch.no_grad(), eval_mode(model):
        whole = call(model, copied(batch), forward)
        try:
            alone = call(model, copied(taken(batch, half, size)), forward)
        except Exception:  # a model that insists on its batch size
            return None
    return compare(whole, alone, half, size).moved


def samples_in(batch: object) -> int:
    """Return the number of samples in a batch; a list of mappings has one for each sample.

    Example:
        >>> images, targets = [torch.zeros(3, 8, 8), torch.zeros(3, 9, 9)], [{"id": 0}, {"id": 1}]
        >>> samples_in((images, targets)), samples_in(torch.zeros(8, 3))
        (2, 8)
    """
    if counts := list(_lists_of_mappings(batch)):
        return counts[0]
    arrays = [leaf for leaf in tree_leaves(batch) if _is_array(leaf) and leaf.ndim]
    return len(arrays[0]) if arrays else batch_size(batch)


def _lists_of_mappings(value: object) -> Iterator[int]:
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, Mapping) for item in value):
            yield len(value)
            return
    elif not isinstance(value, Mapping):
        return
    for item in value.values() if isinstance(value, Mapping) else value:
        yield from _lists_of_mappings(item)


def taken(value: Any, places: Sequence[int], size: int) -> Any:
    """Return the samples at some places of a batch; what has none stays as it is.

    Tensors and arrays are copies; containers are of the same class.

    Example:
        >>> taken({"x": torch.arange(4), "names": ["a", "b", "c", "d"], "scale": 2}, (3, 0), 4)
        {'x': tensor([3, 0]), 'names': ['d', 'a'], 'scale': 2}
    """
    if _has_rows(value, size):
        return value[list(places)]
    if isinstance(value, Mapping):
        part: Any = copy.copy(value)
        for key, item in value.items():
            part[key] = taken(item, places, size)
        return part
    if isinstance(value, list | tuple):
        if len(value) == size and not all(_has_rows(item, size) for item in value):
            items = [value[place] for place in places]
        else:
            items = [taken(item, places, size) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def _has_rows(value: object, size: int) -> bool:
    """Tell whether a tensor or an array has a row for each sample."""
    return _is_array(value) and tuple(getattr(value, "shape", ())[:1]) == (size,)


def _is_array(value: object) -> bool:
    return isinstance(value, Tensor) or type(value).__name__ == "ndarray"
