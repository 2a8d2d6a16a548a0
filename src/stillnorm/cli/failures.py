"""Whose fault an exception is, and how the command line says it."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Literal

import click

import stillnorm
from stillnorm.errors import BatchError, ExportError, StillnormError, TargetError

FINDINGS = 1  # or, for `diff`, differences
BAD_USAGE = 2  # or unreadable input, or code of the user's that raised
INTERNAL = 3
INTERRUPTED = 130  # as shells say it

WHOLE = "stillnorm --traceback ... shows all of it"
_PYTHON = Path(traceback.__file__).parent
_OURS = Path(stillnorm.__file__).parent
_LIBRARIES = ("torch", "click", "google.protobuf", "numpy", "onnx", "rich", "safetensors")


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
    if isinstance(error, SystemExit):
        say(f"your code ended the program: {describe(error)}", WHOLE)
        return BAD_USAGE
    if isinstance(error, StillnormError):
        say(*_put(error))
        return BAD_USAGE
    if is_the_users(error):
        say(f"your code raised {describe(error)}", WHOLE)
        return BAD_USAGE
    if not whole:
        traceback.print_exception(error)
    say(
        f"stillnorm itself failed: {describe(error)}",
        "this is a bug of stillnorm's: please report it",
    )
    return INTERNAL


def _put(error: StillnormError) -> tuple[str, str]:
    """Return fact and help as they are true here, where there is no code to put the help into."""
    cause = error.__cause__
    while isinstance(cause, StillnormError):
        cause = cause.__cause__
    if cause is not None and is_the_users(cause):
        place = _at(cause)
        help = error.help if isinstance(error, ExportError | TargetError) else WHOLE
        return error.fact if error.fact.endswith(place) else error.fact + place, help
    if isinstance(error, BatchError) and error.help.startswith("forward="):
        return error.fact, f"{error.help} (here: --forward net.py:function)"
    return error.fact, error.help


def say(fact: str, help: str) -> None:
    """Print one line of fact, and what to do about it, on stderr."""
    from stillnorm.reports.lines import escaped

    click.echo(click.style("error", fg="red", bold=True) + f": {escaped(fact)}", err=True)
    if help:
        click.echo(f"  help: {escaped(help)}", err=True)


def describe(error: BaseException) -> str:
    """Name an error in one line, with the line of the user's code where it happened.

    Example:
        >>> describe(ValueError("too few values"))
        'ValueError: too few values'
    """
    text = str(error).strip().split("\n")[0]
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return f"{named}{_at(error)}"


def is_the_users(error: BaseException) -> bool:
    """Tell whether the exception came out of the user's model, data or score.

    It did when the model was being called, or when the innermost line outside torch is not one of
    stillnorm's.
    """
    frames = [(frame.f_code, _owner(frame.f_code)) for frame, _ in _walk(error)]
    calling = _OURS / "tracing" / "calling.py"
    if any(Path(code.co_filename) == calling and code.co_name == "call" for code, _ in frames):
        return True
    owners = [owner for _, owner in frames if owner != "library"]
    return bool(owners) and owners[-1] == "user"


def _at(error: BaseException) -> str:
    """Return the innermost line of the user's, in parentheses."""
    if isinstance(error, SyntaxError):
        return ""  # its text names the line
    lines = [
        f" ({Path(frame.f_code.co_filename).name}:{line})"
        for frame, line in _walk(error)
        if _owner(frame.f_code) == "user"
    ]
    return lines[-1] if lines else ""


def _walk(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    return traceback.walk_tb(error.__traceback__)


def _owner(code: CodeType) -> Literal["library", "stillnorm", "user"]:
    """Tell whose code it is. What we build on and Python's own say nothing of who called them."""
    file = Path(code.co_filename)
    if _OURS in file.parents:
        return "stillnorm"
    libraries = (sys.modules[name].__file__ for name in _LIBRARIES if name in sys.modules)
    in_library = any(Path(init).parent in file.parents for init in libraries if init)
    installed = "site-packages" in file.parts or "dist-packages" in file.parts
    in_python = (_PYTHON in file.parents and not installed) or code.co_filename.startswith("<")
    return "library" if in_library or in_python else "user"
