"""Files as targets: what is in one, by its suffix; of a state dict, the norm layers in it.

A state dict holds tensors and nothing else. Class, eps, momentum and mode of a layer are not in it,
and rules that need them say so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from stillnorm.diagnosis.files.skeleton import STATISTICS, Stored, StoredNorm, matching, unreadable
from stillnorm.diagnosis.finding import listed
from stillnorm.errors import FileFormatError
from stillnorm.norms import must_be_a_model
from stillnorm.norms.layer import TENSORS
from stillnorm.reports.numbers import count
from stillnorm.state.files import CHECKPOINTS, read_checkpoint
from stillnorm.state.keys import clean_keys
from stillnorm.state.record import dotted

SUFFIXES = (*CHECKPOINTS, ".onnx", ".pt2")

Target = str | os.PathLike[str] | Mapping[str, object] | Stored


def opened(target: Target) -> tuple[Stored, nn.Module]:
    """Read what is not a model, and return it with the tree of its norm layers."""
    stored = read_target(target)
    return stored, stored.tree()


def read_target(target: Target) -> Stored:
    """Read what is not a model: a file, or a state dict in memory.

    Nothing in a file is run, and nothing is unpickled but tensors.

    Raises:
        FileFormatError: The file cannot be read, or is none of `SUFFIXES`.
        ModelError: It is none of these, and no model of torch's.
    """
    if isinstance(target, Stored):
        return target
    if isinstance(target, Mapping):
        state = {k: t.detach() for k, t in target.items() if isinstance(t, Tensor)}
        return _checkpoint("state dict", clean_keys(state))
    if not isinstance(target, str | os.PathLike):
        must_be_a_model(target)
    path = Path(target)
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        from stillnorm.diagnosis.files.onnx_file import read_onnx

        return read_onnx(path)
    if suffix == ".pt2":
        from stillnorm.diagnosis.files.pt2_file import read_pt2

        return read_pt2(path)
    if suffix not in SUFFIXES:
        raise FileFormatError(
            f"{path} is no file that can be checked: its name ends in {suffix or 'nothing'}",
            help=f"a model, or a file that ends in {', '.join(SUFFIXES)}",
        )
    read = read_checkpoint(path)
    return _checkpoint(path.name, read.state, _which(read.key, read.others))


def _checkpoint(name: str, state: Mapping[str, Tensor], note: str = "") -> Stored:
    norms = tuple(StoredNorm(prefix, tensors) for prefix, tensors in norms_in(state).items())
    return Stored(name, "checkpoint", norms, state, "; ".join(filter(None, (note, _odd(state)))))


def norms_in(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the layers with a running mean or a running variance: prefixes, and their tensors.

    Example:
        >>> import torch
        >>> state = {"bn.running_var": torch.ones(2), "bn.weight": torch.ones(2)}
        >>> {prefix: list(tensors) for prefix, tensors in norms_in(state).items()}
        {'bn': ['weight', 'running_var']}
    """
    found = {prefix: matching(own) for prefix, own in _candidates(state).items()}
    return {
        prefix: tensors
        for prefix, tensors in found.items()
        if not tensors.keys().isdisjoint(STATISTICS)
    }


def _candidates(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return what has the names of a norm layer's tensors, where one of them is a statistic."""
    split = (key.rpartition(".") for key in state)
    return {
        prefix: {name: state[key] for name in TENSORS if (key := dotted(prefix, name)) in state}
        for prefix in dict.fromkeys(prefix for prefix, _, name in split if name in STATISTICS)
    }


def _odd(state: Mapping[str, Tensor]) -> str:
    """Say which tensors of norm layers are left out, and why; nothing where none is."""
    odd = [
        f"{dotted(prefix, name)} ({why})"
        for prefix, own in _candidates(state).items()
        for name, tensor in own.items()
        if (why := unreadable(name, tensor))
    ]
    return f"{count(len(odd), 'tensor')} not read: {listed(odd)}" if odd else ""


def _which(key: str, others: tuple[str, ...]) -> str:
    """Say which of several state dicts was read; nothing where there is one."""
    if not others:
        return ""
    return f"{key!r} was read, not {', '.join(map(repr, others))}"
