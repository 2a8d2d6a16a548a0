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

    from stillnorm.reports import Document

F = TypeVar("F", bound=Callable[..., Any])

format_option = click.option(
    "--format", type=click.Choice(["text", "json"]), default="text", help="How to write the result."
)


TARGETS = """\b
TARGET makes the model:
  package.module:factory     torchvision.models:resnet18
  file.py:factory            net.py:make
  a call with literals       "timm:create_model('resnet50')"
"""


def on_model(command: F, *, needs_data: bool = False) -> F:
    """Add the arguments of every command on a model: the target, and what goes with it."""
    for option in reversed(
        (
            click.argument("target"),
            click.option(
                "--weights",
                type=click.Path(path_type=Path),
                metavar="FILE",
                help="A checkpoint to load into the model: .safetensors, .pt, .pth, .ckpt, .bin.",
            ),
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
            format_option,
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

    def on(self, device: str | None) -> Loaded:
        """Return the same with the model and the batches on a device; None leaves them."""
        if device is None:
            return self
        from stillnorm.cli.device import Moved, existing

        where = existing(device)
        self.model.to(where)
        return replace(self, data=None if self.data is None else Moved(self.data, where))


def load(
    target: str, weights: Path | None, data: str | None, forward: str | None, device: str | None
) -> Loaded:
    """Load a model and its data, and put them where they belong."""
    with working(f"loading {target}"):
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
    from stillnorm.reports import text

    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size((100, 24)).columns if terminal else 100
    color = terminal and "NO_COLOR" not in os.environ
    click.echo(text.write(document, width=max(60, min(100, width)), color=color))
