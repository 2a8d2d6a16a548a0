"""What commands on a model have in common: their options, loading what they name, printing."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click

from stillnorm.cli import targets
from stillnorm.cli.weights import load_weights

if TYPE_CHECKING:
    from torch import nn

    from stillnorm.diagnosis.files.skeleton import Stored
    from stillnorm.reports import Document

F = TypeVar("F", bound=Callable[..., Any])


def format_of(*names: str) -> Callable[[F], F]:
    """Return the option that says how the result is written."""
    return click.option(
        "--format",
        type=click.Choice(names),
        default=names[0],
        show_default=len(names) > 2,
        help="How to write the result.",
    )


format_option = format_of("text", "json")

FILES = """\b
TARGET makes the model, or is a file that is looked at alone:
  package.module:factory     torchvision.models:resnet18
  file.py:factory            net.py:make
  a call with literals       "timm:create_model('resnet50')"
  a file of Keras            model.keras
  a checkpoint               .safetensors, .pt, .pth, .ckpt, .bin
  an exported graph          .onnx, .pt2 of torch.export
"""

TARGETS = """\b
TARGET makes the model:
  package.module:factory     torchvision.models:resnet18
  file.py:factory            net.py:make
  a call with literals       "timm:create_model('resnet50')"
  a file of Keras            model.keras
"""


weights_option = click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A checkpoint to load into the model: .safetensors, .pt, .pth, .ckpt, .bin.",
)


def on_model(
    command: F, *, needs_data: bool = False, format: Callable[[F], F] = format_option
) -> F:
    """Add the arguments of every command on a model: the target, and what goes with it."""
    for option in reversed(
        (
            click.argument("target"),
            weights_option,
            click.option(
                "--data",
                required=needs_data,
                metavar="TARGET",
                help="Batches: a DataLoader, a list of batches, a tensor, or what makes one.",
            ),
            click.option(
                "--forward",
                metavar="TARGET",
                help="A function (model, batch) -> output, where model(batch) is not the call.",
            ),
            click.option("--device", help="Where to put the model and the batches: cuda, cuda:1."),
            format,
        )
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class Loaded:
    """What the options of `on_model` name, loaded."""

    model: nn.Module
    data: object
    forward: Callable[..., Any] | None
    file: Stored | None = None

    def on(self, device: str | None) -> Loaded:
        """Return the same with the model and the batches on a device; None leaves them."""
        if device is None:
            return self
        from stillnorm.cli.device import Moved, existing

        where = existing(device)
        self.model.to(where)
        return replace(self, data=None if self.data is None else Moved(self.data, where))


def load(
    target: str,
    weights: Path | None,
    data: str | None,
    forward: str | None,
    device: str | None,
    *,
    files: bool = False,
) -> Loaded:
    """Load a model and its data, and put them where they belong.

    With `files` the target may be a file instead: then the model is the tree of its norm layers.
    """
    with working(f"loading {target}"):
        if files and (file := targets.load_file(target)) is not None:
            given = {"weights": weights, "data": data, "forward": forward, "device": device}
            for option in (name for name, value in given.items() if value is not None):
                raise click.UsageError(f"--{option} needs a model: {file.name} is a file")
            return Loaded(file.tree(), None, None, file)
        model = targets.load_model(target)
        if weights is not None:
            load_weights(model, weights)
        batches = None if data is None else targets.load_data(data)
        called = None if forward is None else targets.load_function(forward, "model", "batch")
        return Loaded(model, batches, called).on(device)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Say on a terminal's stderr what is going on; whatever the user's code prints goes there too.

    The result alone is written to stdout.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if not sys.stderr.isatty():
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(what):
            yield


class Result(Protocol):
    """What every command prints."""

    def to_json(self) -> str:
        """Return it as JSON."""


def show(result: Result, document: Document, format: str) -> None:
    """Write a result on stdout: as JSON, or its document as text as wide as the terminal."""
    if format == "json":
        click.echo(result.to_json())
    else:
        show_text(document)


def show_text(document: Document) -> None:
    """Write a document on stdout; colours on a terminal only."""
    click.echo(as_text(document, terminal=sys.stdout.isatty()))


def as_text(document: Document, *, terminal: bool) -> str:
    """Return a document as text: as wide as the terminal and in colour, or 100 columns plain."""
    from stillnorm.reports import text

    width = shutil.get_terminal_size((100, 24)).columns if terminal else 100
    color = terminal and "NO_COLOR" not in os.environ
    return text.write(document, width=max(60, min(100, width)), color=color)
