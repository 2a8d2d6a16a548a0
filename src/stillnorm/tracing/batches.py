"""The batches that users hand over: which of them there are, and what is in one.

A tensor or a mapping is one batch, and so is the pair ``(inputs, target)`` that a DataLoader
yields, as a tuple or a list. A DataLoader, a list of batches and an iterator give batches. What
could be read in two ways is an error that says how to write it so that it cannot.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset, IterableDataset

from stillnorm.errors import BatchError, StillnormError


def each_batch(batches: object) -> Iterator[object]:
    """Yield the batches in `batches`.

    Args:
        batches: A tensor or a mapping (one batch); a tuple or list of two whose first item is a
            tensor (one batch and its target), except two tensors that both look like inputs in a
            list; a DataLoader, a list of batches, an iterator.

    Raises:
        BatchError: It is none of these, could be two of them, or fails while it is read.

    Example:
        >>> import torch
        >>> x, y = torch.randn(8, 3), torch.zeros(8, dtype=torch.long)
        >>> len(list(each_batch(x))), len(list(each_batch([x, y]))), len(list(each_batch([x, x])))
        (1, 1, 2)
    """
    if _is_one_batch(batches):
        yield batches
        return
    if isinstance(batches, Dataset) and not isinstance(batches, IterableDataset):
        raise BatchError(
            f"batches= is a {type(batches).__name__}: a Dataset gives samples, not batches",
            help="batches=torch.utils.data.DataLoader(dataset, batch_size=64)",
        )
    if not isinstance(batches, Iterable) or isinstance(batches, str | bytes):
        calls = callable(batches) and not isinstance(batches, Tensor)
        raise BatchError(
            f"batches= cannot be a {type(batches).__name__}",
            help=f"call it: {getattr(batches, '__name__', 'batches')}()"
            if calls
            else "give a tensor, a DataLoader, a list of batches, or any iterable of batches",
        )
    iterator = iter(batches)
    index = 0
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except StillnormError:  # of batches inside batches: it says what to do
            raise
        except Exception as error:
            raise BatchError(
                f"reading batch {index} of batches= raised {first_line(error)}",
                help="the error above is from the data, not from the model",
            ) from error
        yield batch
        index += 1


def first_tensor(batch: object) -> Tensor:
    """Return the first tensor in a batch: in mappings, sequences and attributes of objects.

    Raises:
        BatchError: There is none.

    Example:
        >>> import torch
        >>> first_tensor({"pixel_values": torch.zeros(2, 3), "labels": torch.ones(2)}).shape
        torch.Size([2, 3])
    """
    tensor = next(tensors_in(batch), None)
    if tensor is None:
        kind = type(batch).__name__
        raise BatchError(
            f"there is no tensor in the batch, a {kind}",
            help="torch.from_numpy(batch), of the dtype that the model has"
            if kind == "ndarray"
            else "give batches of tensors",
        )
    return tensor


def batch_size(batch: object) -> int:
    """Return the number of samples in a batch: the length of its first tensor.

    Example:
        >>> import torch
        >>> batch_size((torch.zeros(8, 3), torch.zeros(8)))
        8
    """
    tensor = first_tensor(batch)
    return len(tensor) if tensor.dim() else 1


def copied(value: object) -> object:
    """Return a batch with its tensors copied: models write to what they are given."""
    return tree_map(_copied, value)


def _copied(leaf: object) -> object:
    if isinstance(leaf, Tensor):
        return leaf.detach().clone().requires_grad_(leaf.requires_grad)
    # An object with tensors of its own (transformers' BatchEncoding, a data class).
    return leaf if next(tensors_in(leaf), None) is None else copy.deepcopy(leaf)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield every tensor in nested mappings, sequences and objects with attributes."""
    yield from _tensors_in(value, set())


def _tensors_in(value: object, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts: Iterable[object] = value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        parts = value
    else:
        parts = getattr(value, "__dict__", {}).values()
    for part in parts:
        yield from _tensors_in(part, seen)


def _is_one_batch(batches: object) -> bool:
    """Tell one batch from several; see `each_batch` for the rule."""
    if isinstance(batches, Tensor | Mapping):
        return True
    if not isinstance(batches, list | tuple) or not batches or not isinstance(batches[0], Tensor):
        return False
    inputs = [item for item in batches if isinstance(item, Tensor) and _like(item, batches[0])]
    if len(batches) == 2:
        if isinstance(batches, tuple) or len(inputs) == 1:
            return True
        if batches[0].shape[1:] == batches[1].shape[1:] or len(batches[0]) != len(batches[1]):
            return False  # a target has as many samples as its input
        raise _ambiguous(batches)
    if len(inputs) < len(batches):
        raise _ambiguous(batches)
    return False


def _like(item: Tensor, first: Tensor) -> bool:
    """Tell whether a tensor could be another batch of inputs: (N, C, *) of floats, the same C."""
    return (
        item.is_floating_point()
        and first.is_floating_point()
        and item.dim() == first.dim() >= 2
        and item.shape[1] == first.shape[1]
    )


def _ambiguous(batches: Sequence[object]) -> BatchError:
    shapes = ", ".join(
        str(tuple(item.shape)) if isinstance(item, Tensor) else type(item).__name__
        for item in batches
    )
    return BatchError(
        f"batches= is a {type(batches).__name__} of {shapes}: one batch, or {len(batches)}?",
        help="batches=[(inputs, target)] is one batch with its target; "
        "batches=iter([a, b]) is several",
    )


def first_line(error: BaseException) -> str:
    """Name an error in one line."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
