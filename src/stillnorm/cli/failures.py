"""Whose fault an exception is, and how the command line says it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import click

import stillnorm
from stillnorm.errors import StillnormError

FINDINGS = 1  # or, for `diff`, differences
BAD_USAGE = 2  # or unreadable input, or code of the user's that raised
INTERNAL = 3
INTERRUPTED = 130  # as shells say it

_OURS = Path(stillnorm.__file__).parent


def report(error: BaseException, *, whole: bool) -> int:
    """Print on stderr what went wrong, and return the exit code.

    Args:
        error: The exception that ended the command.
        whole: Whether to print the traceback too.
    """
    if whole:
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return INTERRUPTED
    if isinstance(error, StillnormError):
        say(error.fact, error.help)
        return BAD_USAGE
    if is_the_users(error):
        say(f"your code raised {describe(error)}", "stillnorm --traceback ... shows all of it")
        return BAD_USAGE
    if not whole:
        traceback.print_exception(error)
    say(f"stillnorm failed: {describe(error)}", "this is a bug of stillnorm's: please report it")
    return INTERNAL


def say(fact: str, help: str) -> None:
    """Print one line of fact, and what to do about it, on stderr."""
    click.echo(click.style("error", fg="red", bold=True) + f": {fact}", err=True)
    if help:
        click.echo(f"  help: {help}", err=True)


def describe(error: BaseException) -> str:
    """Name an error in one line, with the line of the user's code where it happened.

    Example:
        >>> describe(ValueError("too few values"))
        'ValueError: too few values'
    """
    text = str(error).strip().split("\n")[0]
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    place = _place(error)
    return f"{named} ({place})" if place else named


def is_the_users(error: BaseException) -> bool:
    """Tell whether the exception came out of the user's model, data or score.

    It did when the model was being called, or when the innermost line outside torch is not one of
    stillnorm's.
    """
    frames = list(_frames(error))
    calling = _OURS / "tracing" / "calling.py"
    if any(Path(f.f_code.co_filename) == calling and f.f_code.co_name == "call" for f in frames):
        return True
    outside = [frame for frame in frames if not _is_library(frame)]
    return bool(outside) and _OURS not in Path(outside[-1].f_code.co_filename).parents


def _place(error: BaseException) -> str:
    """Return the innermost line that is not torch's, the import system's or stillnorm's."""
    if isinstance(error, SyntaxError):
        return ""  # its text names the line
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if not _is_library(frame) and _OURS not in file.parents:
            place = f"{file.name}:{line}"
    return place


def _frames(error: BaseException) -> Iterator[FrameType]:
    return (frame for frame, _ in traceback.walk_tb(error.__traceback__))


def _is_library(frame: FrameType) -> bool:
    """Tell a line of torch's, or of the import system, from all others."""
    name = frame.f_code.co_filename
    torch = sys.modules.get("torch")
    inside_torch = torch is not None and Path(torch.__file__ or "").parent in Path(name).parents
    return inside_torch or name.startswith("<frozen")
