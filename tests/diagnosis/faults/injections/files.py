"""Faults in checkpoints and exported programs; they are written to the folder given."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from diagnosis.faults.grid import Case, Subject
from diagnosis.faults.injections.state import negative_variance, not_a_number


def without_statistics(it: Subject, folder: Path) -> Case:
    """A checkpoint in which one layer has a count of batches and nothing counted."""
    state = it.model.state_dict()
    for name in ("running_mean", "running_var"):
        del state[f"{it.victim.path}.{name}"]
    return saved(state, folder, it.victim.path)


def without_one_variance(it: Subject, folder: Path) -> Case:
    state = it.model.state_dict()
    del state[f"{it.victim.path}.running_var"]
    return saved(state, folder, it.victim.path)


def saved_with_nan(it: Subject, folder: Path) -> Case:
    not_a_number(it)
    return saved(it.model.state_dict(), folder, it.victim.path)


def saved_with_negative_variance(it: Subject, folder: Path) -> Case:
    negative_variance(it)
    return saved(it.model.state_dict(), folder, it.victim.path)


def saved_as_memory_was(it: Subject, folder: Path) -> Case:
    it.victim.module.num_batches_tracked.fill_(2**40)
    return saved(it.model.state_dict(), folder, it.victim.path)


def saved_in_half_precision(it: Subject, folder: Path) -> Case:
    """In float16, which has lost the variance of a channel."""
    it.victim.module.running_var[0] = 1e-8
    it.victim.module.half()
    return saved(it.model.state_dict(), folder, it.victim.path)


def saved(state: dict[str, Tensor], folder: Path, path: str) -> Case:
    torch.save(state, folder / "model.pt")
    return Case(folder / "model.pt", (path,))


def exported_in_train_mode(it: Subject, folder: Path) -> Case:
    return exported(it.model.train(), it, folder, it.in_order)


def exported_with_one_layer_in_train_mode(it: Subject, folder: Path) -> Case:
    it.victim.module.train()
    return exported(it.model, it, folder, (it.victim.path,))


def exported(model: nn.Module, it: Subject, folder: Path, paths: tuple[str, ...]) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (it.batches()[0][:2],))
        torch.export.save(program, folder / "model.pt2")
    return Case(folder / "model.pt2", paths)
