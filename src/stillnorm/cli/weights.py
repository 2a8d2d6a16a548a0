"""``--weights FILE`` and ``--out FILE``: a checkpoint into a model, and out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillnorm.errors import FileFormatError

if TYPE_CHECKING:
    from torch import Tensor, nn

_COUNTER = "num_batches_tracked"  # checkpoints from before torch 0.4.1 have none


def load_weights(model: nn.Module, file: Path) -> None:
    """Load a checkpoint, whole or not at all. What the model has no place for is said on stderr.

    Raises:
        FileFormatError: The file is not a checkpoint, lacks tensors of the model, or has them in
            another shape; then nothing was loaded.
    """
    from stillnorm.state import read_state
    from stillnorm.state.keys import clean_keys

    state, raw = read_state(file), model.state_dict()
    own = clean_keys(raw)
    missing = [k for k in own if k not in state and not k.endswith(_COUNTER)]
    if missing:
        raise FileFormatError(
            f"{file.name} lacks {len(missing)} of the model's {len(own)} tensors: {few(missing)}",
            help=_why_missing(state, own),
        )
    reshaped = [k for k in own if k in state and state[k].shape != own[k].shape]
    if reshaped:
        key = reshaped[0]
        raise FileFormatError(
            f"{key} is {_shape(state[key])} in {file.name} and {_shape(own[key])} in the model",
            help="make the model as it was trained, with the same number of classes and channels",
        )
    if unused := [k for k in state if k not in own]:
        have = "tensor has" if len(unused) == 1 else "tensors have"
        click.echo(
            f"{file.name}: {len(unused)} {have} no place in the model: {few(unused)}", err=True
        )
    names = dict(zip(own, raw, strict=True))
    model.load_state_dict({names[k]: v for k, v in state.items() if k in own}, strict=False)


def must_have_a_folder(out: Path | None, option: str = "--out") -> None:
    """Say now, not after the work, that a file cannot be written."""
    if out is not None and not out.parent.is_dir():
        raise click.BadParameter(f"there is no folder {out.parent}", param_hint=option)


def must_be_tensors(state: Mapping[str, object]) -> None:
    """Say now, not after the work, that a module has extra state of another kind."""
    from torch import Tensor

    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise FileFormatError(
                f"{key} is a {type(value).__name__}: .safetensors holds tensors only",
                help="do the same in Python, then torch.save",
            )


def _why_missing(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """Tell another model from the same one under another name, or with its norms split."""
    for key in own:
        path, _, name = key.rpartition(".")
        if f"{path}.sites.0.{name}" in state:
            return (
                f"{path} is split in the file, a norm for each of its calls: split the model "
                "first, with sn.split_shared(model, batches) in what makes it"
            )
        ending = [k for k in state if k.endswith(f".{key}")]
        if ending:
            return f"it has {ending[0]} instead: strip the prefix, or name the part of the model"
    return f"it holds {few(state)}: is it this model's?"


def few(keys: Iterable[str]) -> str:
    """Write the first three of some keys."""
    from stillnorm.state.record import shown

    keys = list(keys)
    return ", ".join(map(shown, keys[:3])) + (", ..." if len(keys) > 3 else "")


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
