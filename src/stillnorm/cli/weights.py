"""``--weights FILE``: a checkpoint into a model that code has made."""

from __future__ import annotations

from collections.abc import Iterable
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
            f"{file.name} lacks {len(missing)} of the model's {len(own)} tensors: {_few(missing)}",
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
            f"{file.name}: {len(unused)} {have} no place in the model: {_few(unused)}", err=True
        )
    names = dict(zip(own, raw, strict=True))
    model.load_state_dict({names[k]: v for k, v in state.items() if k in own}, strict=False)


def _why_missing(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """Tell another model from the same one under another name."""
    for key in own:
        ending = [k for k in state if k.endswith(f".{key}")]
        if ending:
            return f"it has {ending[0]} instead: strip the prefix, or name the part of the model"
    return f"it holds {_few(state)}: is it this model's?"


def _few(keys: Iterable[str]) -> str:
    keys = list(keys)
    return ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"
