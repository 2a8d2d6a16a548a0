"""`--device` promises: every tensor of every batch moves, one batch at a time, nothing else."""

from __future__ import annotations

import click
import pytest
import torch

from stillnorm.cli.device import Moved, existing

META = torch.device("meta")


def test_every_tensor_of_a_batch_moves():
    batch = {"image": torch.ones(2, 3), "pair": (torch.ones(1), [torch.ones(1)]), "name": "cat"}
    (moved,) = Moved([batch], META)
    assert moved["image"].device == moved["pair"][0].device == moved["pair"][1][0].device == META
    assert moved["name"] == "cat"
    assert batch["image"].device.type == "cpu"


def test_a_single_tensor_is_one_batch():
    (moved,) = Moved(torch.ones(4, 3), META)
    assert moved.shape == (4, 3)


def test_batches_move_when_they_are_asked_for():
    taken = []

    def batches():
        for i in range(3):
            taken.append(i)
            yield torch.ones(1, 2)

    next(iter(Moved(batches(), META)))
    assert taken == [0]


def test_batches_can_be_read_again():
    moved = Moved([torch.ones(1, 2), torch.ones(1, 2)], META)
    assert len(list(moved)) == len(list(moved)) == 2


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "cpu:x"])
def test_a_device_that_is_not_there(name):
    with pytest.raises(click.BadParameter):
        existing(name)


def test_the_option_moves_the_model(run):
    assert " 1 .. 1" in run("inspect", "net.py:healthy").stdout
    assert " none" in run("inspect", "net.py:healthy", "--device", "meta").stdout
