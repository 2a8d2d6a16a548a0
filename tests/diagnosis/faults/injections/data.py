"""Faults of what the model is fed, and of what it does with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from diagnosis.faults.grid import Case, Subject
from diagnosis.faults.injections.places import convolution_and_norm
from diagnosis.faults.parts import Leaking


def scaled_to_255(it: Subject) -> Case:
    return prepared(it, lambda x: 255 * x)


def normalised_for_another(it: Subject) -> Case:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return prepared(it, lambda x: (x - mean) / std)


def prepared(it: Subject, wrongly: Any) -> Case:
    """Train on images in 0..1, and check on the same prepared otherwise."""
    it.recalibrate([photo(x) for x in it.batches(64, seed=2)])
    return it.case(it.in_order[0], batches=[wrongly(photo(x)) for x in it.batches()])


def photo(x: Tensor) -> Tensor:
    """Make an image in 0..1, warm in colour."""
    return (x + torch.tensor([0.6, 0.0, -0.6]).view(1, 3, 1, 1)).sigmoid()


def domains_in_turns(it: Subject) -> Case:
    return shifted(it, lambda i: 3.0 * (i % 2), "SN308")


def sorted_batches(it: Subject) -> Case:
    return shifted(it, lambda i: 1.5 * i, "SN309")


def shifted(it: Subject, by: Any, code: str) -> Case:
    """Train on batches each of which is brighter by an amount of its own, and check on such."""

    def make(seed: int) -> list[Tensor]:
        return [x + by(i) for i, x in enumerate(it.batches(32, 8, seed))]

    it.recalibrate(make(2))
    return it.case(it.in_order[0], batches=make(1), select=("DEFAULT", code))


def answers_of_mates(it: Subject) -> Case:
    """A model that reads the class of a batch off what its samples have in common."""
    it.model, it.forward = Leaking(it.model, it.call), None
    batches = [
        (x + 2.0 * (i % 2), torch.full((8,), i % 2)) for i, x in enumerate(it.batches(64, 8))
    ]
    it.recalibrate([x for x, _ in batches])

    def accuracy(output: Tensor, batch: tuple[Tensor, Tensor]) -> float:
        return float(((output.flatten() > 0) == batch[1].bool()).float().mean())

    return it.case(*it.in_order, batches=batches, score=accuracy, select=("DEFAULT", "SN310"))


def padded(it: Subject) -> Case:
    """Samples of several lengths, padded with zeros at the end."""

    def make(seed: int, n: int) -> list[Tensor]:
        return [end_with_zeros(x) for x in it.batches(n, seed=seed)]

    it.recalibrate(make(2, 64))
    return it.case(it.in_order[0], batches=make(1, 32), select=("DEFAULT", "SN209"))


def end_with_zeros(x: Tensor) -> Tensor:
    length = x.shape[-1]
    ends = length // 4 + torch.arange(len(x)) % (length // 2)
    beyond = torch.arange(length) >= ends[:, None]
    return x.masked_fill(beyond.view(len(x), *[1] * (x.dim() - 2), length), 0)


def infinite_sample(it: Subject) -> Case:
    batches = it.batches()
    batches[1][3, 0] = torch.inf
    return it.case(it.in_order[0], batches=batches)


def averaged_weights(it: Subject) -> Case:
    """Average weights over a way that one convolution goes, with the statistics of its end."""
    conv, layer = convolution_and_norm(it)
    average = AveragedModel(it.model)
    for _ in range(4):
        with torch.no_grad():
            conv.weight += conv.weight.std() * torch.randn_like(conv.weight)
        it.recalibrate()
        average.update_parameters(it.model)
    it.model = average
    return it.case(layer.path, select=("DEFAULT", "SN602"))


def large_offset(it: Subject) -> Case:
    """Give the convolution before a norm a bias of ten thousand deviations."""
    conv, layer = convolution_and_norm(it)
    conv.bias = nn.Parameter(1e4 * layer.running_var.sqrt())
    layer.module.running_mean += conv.bias.detach()
    return it.case(layer.path)


def overflowing_weights(it: Subject) -> Case:
    """A convolution whose outputs are beyond the range of their type."""
    conv, layer = convolution_and_norm(it)
    with torch.no_grad():
        conv.weight *= 1e38
    return it.case(layer.path)
