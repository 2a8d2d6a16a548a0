"""Faults of the network: layers that are shared, misplaced, left behind."""

from __future__ import annotations

import torch
from torch import nn

from diagnosis.faults.grid import Case, Subject
from diagnosis.faults.injections.places import alike, classes, convolution_and_norm
from diagnosis.faults.parts import Captions, Ending, FrozenBatchNorm2d, with_activation


def unused(it: Subject) -> Case:
    it.model.spare = nn.BatchNorm2d(5)
    return it.case("spare")


def shared(it: Subject) -> Case:
    """Use one norm in place of another of the same size as well."""
    first, other = alike(it)
    it.put(other.path, first.module)
    it.recalibrate()
    return it.case(first.path)


def aliased_buffers(it: Subject) -> Case:
    first, other = alike(it)
    other.module.running_mean = first.module.running_mean
    other.module.running_var = first.module.running_var
    return it.case(first.path, other.path)


def two_names(it: Subject) -> Case:
    it.model.again = it.victim.module
    return it.case(it.victim.path)


def norm_at_the_end(it: Subject) -> Case:
    return ended(it, nn.BatchNorm1d(classes(it)), size=16)


def two_samples(it: Subject) -> Case:
    n = classes(it)
    return ended(it, nn.BatchNorm1d(n), nn.Linear(n, 4), size=2)


def small_batches(it: Subject) -> Case:
    n = classes(it)
    return ended(it, nn.BatchNorm1d(n), nn.Linear(n, 4), size=4)


def ended(it: Subject, *layers: nn.Module, size: int) -> Case:
    """Put layers behind the model, the first of them a norm."""
    it.model, it.forward = Ending(it.model, it.call, *layers), None
    it.recalibrate()
    return it.case("ending.0", batches=it.batches(32, size))


def bias_before_the_norm(it: Subject) -> Case:
    """Give the convolution before a norm a bias, and the norm's mean the same."""
    conv, layer = convolution_and_norm(it)
    conv.bias = nn.Parameter(0.1 * torch.randn(layer.num_features))
    layer.module.running_mean += conv.bias.detach()
    return it.case(layer.path)


def dropout_before_the_convolution(it: Subject) -> Case:
    conv, layer = convolution_and_norm(it)
    path = next(name for name, module in it.model.named_modules() if module is conv)
    it.put(path, nn.Sequential(nn.Dropout(0.5), conv))
    return it.case(layer.path)


def features_on_the_last_axis(it: Subject) -> Case:
    """A decoder of captions on the features, with BatchNorm1d on (N, L, C)."""
    it.model, it.forward = Captions(it.model, it.call, classes(it)), None
    it.recalibrate()
    return it.case("norm", select=("DEFAULT", "SN208"))


def lazy(it: Subject) -> Case:
    rank = {1: nn.LazyBatchNorm1d, 2: nn.LazyBatchNorm2d, 3: nn.LazyBatchNorm3d}
    path = it.victim.path
    it.put(path, rank[it.batches()[0].dim() - 2]())
    return Case(it.model, (path,))


def stripped(it: Subject) -> Case:
    """A norm with an activation inside, converted by torch."""
    path = it.victim.path
    norm = with_activation(it.victim.module)
    it.put(path, nn.SyncBatchNorm.convert_sync_batchnorm(norm))
    it.recalibrate()
    return it.case(path, select=("DEFAULT", "SN503"))


def foreign_without_eps(it: Subject) -> Case:
    path = it.victim.path
    it.put(path, FrozenBatchNorm2d(it.victim.module))
    it.recalibrate()
    return it.case(path)
