"""The demo's training loop and its two scores. Nothing here knows of norms."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from stillnorm.demo.data import Labelled


def train(
    net: nn.Module,
    data: Labelled,
    steps: Iterable[Tensor],
    optimizer: torch.optim.Optimizer,
    schedule: OneCycleLR | None = None,
) -> None:
    """Train by cross entropy on the batches whose indices `steps` gives, in the present modes."""
    for index in steps:
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(logits(net(data.x[index])), data.y[index]))
        optimizer.step()
        if schedule is not None:
            schedule.step()


def logits(output: Any) -> Tensor:
    """Return the class scores of an output; a network may return more beside them."""
    scores: Tensor = output[0] if isinstance(output, tuple) else output
    return scores


def accuracy(output: Any, batch: tuple[Tensor, Tensor]) -> float:
    """Return the fraction of labels that are predicted right: of images, or of pixels."""
    return float((logits(output).argmax(1) == batch[1]).float().mean())


@torch.no_grad()
def measured_accuracy(net: nn.Module, data: Labelled, size: int) -> float:
    """Return the accuracy over all batches, in the present modes."""
    right = sum(accuracy(net(x), (x, y)) * len(x) for x, y in data.batches(size))
    return right / len(data)


@torch.no_grad()
def mean_iou(net: nn.Module, data: Labelled, size: int, classes: int) -> float:
    r"""Return the mean over classes of intersection over union, in the present modes.

    With :math:`n_{ij}` the pixels of class i that are predicted as j:

    .. math:: \frac{1}{C} \sum_i \frac{n_{ii}}{\sum_j n_{ij} + \sum_j n_{ji} - n_{ii}}
    """
    n = torch.zeros(classes, classes)
    for x, y in data.batches(size):
        predicted = net(x).argmax(1)
        n += torch.bincount((y * classes + predicted).flatten(), minlength=classes**2).view_as(n)
    return float((n.diag() / (n.sum(0) + n.sum(1) - n.diag())).nanmean())
