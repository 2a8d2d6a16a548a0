"""Faults of the training step and its optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diagnosis import steps
from diagnosis.faults.grid import Case, Subject
from diagnosis.faults.injections.places import freeze_parameters_up_to

MakeStep = Callable[[torch.optim.Optimizer], steps.TrainStep]


def trained(it: Subject, make: MakeStep, mode: bool = True, **given: Any) -> Case:
    """Check the model with a training step; unless paths are given it concerns all layers."""
    it.as_function()
    paths = given.pop("paths", it.paths)
    it.model.train(mode)
    optimizer = steps.sgd(it.model, lr=0.01)
    return it.case(*paths, train_step=make(optimizer), optimizer=optimizer, **given)


def frozen_backbone(it: Subject) -> Case:
    it.as_function()
    return trained(it, steps.plain, paths=freeze_parameters_up_to(it))


def left_in_eval(it: Subject) -> Case:
    """As a validation has left it."""
    return trained(it, steps.plain, mode=False)


def checkpointing(it: Subject) -> Case:
    return trained(it, lambda optimizer: steps.checkpointed(optimizer, reentrant=False))


def checkpointing_reentrant(it: Subject) -> Case:
    return trained(it, lambda optimizer: steps.checkpointed(optimizer, reentrant=True))


def sharpness_aware(it: Subject) -> Case:
    return trained(it, steps.sam)


def attacked(it: Subject) -> Case:
    return trained(it, lambda optimizer: steps.attacking(optimizer, by_backward=False))


def validation_inside(it: Subject) -> Case:
    return trained(it, steps.validating)


def micro_batches(it: Subject) -> Case:
    return trained(it, steps.accumulating, select=("DEFAULT", "SN307"))


def gradient_penalty(it: Subject) -> Case:
    return trained(it, steps.penalised, select=("DEFAULT", "SN311"))


def stale_gradient(it: Subject) -> Case:
    """Freeze a weight after a backward, in an optimizer that decays it."""
    it.as_function()
    it.model.train()
    optimizer = torch.optim.SGD(it.model.parameters(), lr=0.01, weight_decay=0.1)
    steps.loss_of(it.model(it.batches()[0])).backward()
    it.victim.weight.requires_grad_(False)

    def train_step(model: nn.Module, x: Tensor) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = None
        steps.loss_of(model(x)).backward()
        optimizer.step()

    return it.case(it.victim.path, train_step=train_step, optimizer=optimizer)


def replaced_after_the_optimizer(it: Subject) -> Case:
    optimizer = steps.sgd(it.model)
    it.put(it.victim.path, copy.deepcopy(it.victim.module))
    return it.case(it.victim.path, optimizer=optimizer)


def decayed(it: Subject) -> Case:
    own = list(it.victim.module.parameters())
    others = [p for p in it.model.parameters() if all(p is not q for q in own)]
    groups = [{"params": others}, {"params": own, "weight_decay": 0.01}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    return it.case(it.victim.path, optimizer=optimizer, select=("DEFAULT", "SN305"))
