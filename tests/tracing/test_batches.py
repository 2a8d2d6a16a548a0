"""One batch or several: the rule for what users hand over, and errors instead of guesses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from stillnorm.errors import BatchError
from stillnorm.tracing import batch_size, each_batch, first_tensor

X = torch.zeros(4, 3, 8, 8)
Y = torch.zeros(4, dtype=torch.long)


class Stream(IterableDataset):
    """No length, no end known."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from (X, X, X)


ONE = {
    "a tensor": X,
    "a mapping": {"pixel_values": X, "labels": Y},
    "a tuple with class indices": (X, Y),
    "a list with class indices, as default_collate gives": [X, Y],
    "a tuple of two inputs (an autoencoder's pair)": (X, X),
    "a list with a regression target": [X, torch.zeros(4)],
    "a list with another trailing shape": [X, torch.zeros(4, 10)],
    "a list with a mask": [X, torch.zeros(4, 8, 8)],
    "a list with a dict of targets": [X, {"boxes": X}],
    "vectors and a float per sample": [torch.zeros(4, 3), torch.zeros(4)],
}


@pytest.mark.parametrize("batches", ONE.values(), ids=ONE)
def test_is_one_batch(batches: object) -> None:
    assert [id(b) for b in each_batch(batches)] == [id(batches)]


SEVERAL = {
    "a list of two batches": ([X, X], 2),
    "two ragged batches": ([X, X[:1]], 2),
    "two of different length and spatial size": ([X, X[:3, ..., :4]], 2),
    "a list of three": ([X, X, X[:2]], 3),
    "three of different spatial size": ([X, X[..., :4], X], 3),
    "a tuple of three": ((X, X, X), 3),
    "a list of pairs": ([(X, Y), (X, Y)], 2),
    "a list of one pair": ([(X, Y)], 1),
    "a list of dicts": ([{"x": X}, {"x": X}], 2),
    "a list of one tensor": ([X], 1),
    "a generator": ((x for x in (X, X)), 2),
    "an iterator without a length": (DataLoader(Stream(), batch_size=None), 3),
    "an iterable dataset": (Stream(), 3),
    "nothing": ([], 0),
}


@pytest.mark.parametrize(("batches", "count"), SEVERAL.values(), ids=SEVERAL)
def test_is_several_batches(batches: object, count: int) -> None:
    assert len(list(each_batch(batches))) == count


def test_loader_gives_its_batches() -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=3)
    assert [batch_size(batch) for batch in each_batch(loader)] == [3, 1]


AMBIGUOUS = {
    "two lists of inputs of different size": [X, X[..., :4]],
    "three tensors of which one is no input": [X, X, Y],
    "token ids, a mask and labels": [Y[:, None], Y[:, None], Y],
}


@pytest.mark.parametrize("batches", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_ambiguity_raises_and_says_how_to_write_either(batches: object) -> None:
    with pytest.raises(BatchError, match=r"one batch, or \d") as caught:
        list(each_batch(batches))
    assert "batches=[(inputs, target)]" in caught.value.help


def test_a_dataset_is_not_batches() -> None:
    with pytest.raises(BatchError, match="samples, not batches") as caught:
        list(each_batch(TensorDataset(X, Y)))
    assert "DataLoader(dataset" in caught.value.help


@pytest.mark.parametrize("batches", [3, None, "data", torch.nn.Linear(2, 2)])
def test_what_has_no_batches_raises(batches: object) -> None:
    with pytest.raises(BatchError, match="cannot be a"):
        list(each_batch(batches))


def test_an_error_of_the_loader_names_the_batch_and_keeps_its_cause() -> None:
    def loader() -> Iterator[Tensor]:
        yield X
        raise OSError("disk full\nand more")

    with pytest.raises(BatchError, match="reading batch 1") as caught:
        list(each_batch(loader()))
    assert caught.value.fact.endswith("OSError: disk full")
    assert isinstance(caught.value.__cause__, OSError)


def test_ctrl_c_in_the_loader_stays_ctrl_c() -> None:
    def loader() -> Iterator[Tensor]:
        yield X
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(each_batch(loader()))


@dataclass
class Graph:
    """A batch of a library that stillnorm does not know."""

    name: str
    x: Tensor


@pytest.mark.parametrize(
    "batch", [X, (X, Y), [X], {"a": None, "x": X}, ({"x": X}, Y), Graph("g", X)]
)
def test_first_tensor_is_found_wherever_it_is(batch: object) -> None:
    assert first_tensor(batch) is X
    assert batch_size(batch) == 4


def test_a_batch_without_tensors_has_no_first_one() -> None:
    with pytest.raises(BatchError, match="no tensor"):
        first_tensor({"paths": ["a.png"]})


def test_objects_that_contain_themselves_end() -> None:
    batch: dict[str, object] = {}
    batch["self"] = batch
    with pytest.raises(BatchError):
        first_tensor(batch)
