"""Parts of a batch: each sample whole, containers of their class, everything else as it was."""

from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch

from stillnorm.diagnosis.evidence.composition import samples_in, taken

Pair = namedtuple("Pair", "x y")
PLACES = (2, 0)


def test_rows_are_taken_in_the_order_asked_for() -> None:
    x = torch.arange(12).reshape(4, 3)
    assert taken(x, PLACES, 4).tolist() == [[6, 7, 8], [0, 1, 2]]
    assert taken(x.numpy(), PLACES, 4).tolist() == [[6, 7, 8], [0, 1, 2]]
    assert taken(x, PLACES, 4).data_ptr() != x.data_ptr()


@pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
def test_mappings_keep_their_class_and_what_has_no_samples(kind: type) -> None:
    scale = torch.ones(3)
    batch = kind({"x": torch.arange(4), "scale": scale, "n": 4})
    part = taken(batch, PLACES, 4)
    assert type(part) is kind
    assert part["x"].tolist() == [2, 0]
    assert part["scale"] is scale
    assert batch["x"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("pair", [(1, 2), [1, 2], Pair(1, 2)], ids=["tuple", "list", "named"])
def test_sequences_of_tensors_are_taken_apart_tensor_by_tensor(pair: object) -> None:
    make = pair._make if isinstance(pair, Pair) else type(pair)
    part = taken(make([torch.arange(4), np.arange(4.0)]), PLACES, 4)
    assert type(part) is type(pair)
    assert [item.tolist() for item in part] == [[2, 0], [2.0, 0.0]]


def test_a_list_with_one_item_per_sample() -> None:
    images = [torch.full((3, i + 1, 2), float(i)) for i in range(4)]
    targets = [{"id": i} for i in range(4)]
    part_images, part_targets = taken((images, targets), PLACES, 4)
    assert [x is images[i] for x, i in zip(part_images, PLACES, strict=True)] == [True, True]
    assert part_targets == [{"id": 2}, {"id": 0}]


def test_two_samples_in_two_tensors_are_no_two_items() -> None:
    x, y = taken((torch.zeros(2, 3), torch.zeros(2)), (1,), 2)
    assert (x.shape, y.shape) == ((1, 3), (1,))


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(5, 2), 5),
        ((torch.zeros(5, 2), torch.zeros(5)), 5),
        ({"images": [torch.zeros(3, 4, 4)] * 2, "targets": [{"a": 0}, {"a": 1}]}, 2),
        (([torch.zeros(3, 4, 4)] * 5, [{}] * 5), 5),
        (torch.zeros(()), 1),
    ],
)
def test_samples_are_counted(batch: object, samples: int) -> None:
    assert samples_in(batch) == samples
