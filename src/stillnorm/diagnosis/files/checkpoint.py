"""Files as targets: what is in one, by its suffix; of a state dict, the norm layers in it.

A state dict holds tensors and nothing else. Class, eps, momentum and mode of a layer are not in it,
and rules that need them say so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from stillnorm.diagnosis.files.skeleton import Stored, StoredNorm
from stillnorm.errors import FileFormatError
from stillnorm.norms.layer import TENSORS
from stillnorm.state.files import CHECKPOINTS, read_checkpoint
from stillnorm.state.keys import clean_keys
from stillnorm.state.record import dotted

STATISTICS = ("running_mean", "running_var")
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
    """
    if isinstance(target, Stored):
        return target
    if isinstance(target, Mapping):
        state = {k: t.detach() for k, t in target.items() if isinstance(t, Tensor)}
        return _checkpoint("state dict", clean_keys(state))
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
    return Stored(name, "checkpoint", norms, state, note)


def norms_in(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the layers with a running mean or a running variance: prefixes, and their tensors.

    Example:
        >>> import torch
        >>> state = {"bn.running_var": torch.ones(2), "bn.weight": torch.ones(2)}
        >>> {prefix: list(tensors) for prefix, tensors in norms_in(state).items()}
        {'bn': ['weight', 'running_var']}
    """
    lengths: dict[str, int] = {}
    for key, tensor in state.items():
        prefix, _, name = key.rpartition(".")
        if name in STATISTICS and tensor.ndim == 1 and tensor.is_floating_point():
            lengths.setdefault(prefix, len(tensor))
    found = {}
    for prefix, length in lengths.items():
        own = {name: state[key] for name in TENSORS if (key := dotted(prefix, name)) in state}
        found[prefix] = {
            name: tensor
            for name, tensor in own.items()
            if tensor.shape == ((length,) if name != "num_batches_tracked" else ())
        }
    return found


def _which(key: str, others: tuple[str, ...]) -> str:
    """Say which of several state dicts was read; nothing where there is one."""
    if not others:
        return ""
    return f"{key!r} was read, not {', '.join(map(repr, others))}"
