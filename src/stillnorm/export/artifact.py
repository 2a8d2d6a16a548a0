"""What an exporter has written, and its errors in one line."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.export import ExportedProgram

from stillnorm.diagnosis.files.skeleton import Stored
from stillnorm.errors import ExportError, FileFormatError, StillnormError
from stillnorm.export.call import Call
from stillnorm.export.report import Port
from stillnorm.tracing import first_line


@dataclass(frozen=True, eq=False)
class Artifact:
    """A file, just written.

    Args:
        program: What torch has captured.
        opset: The version of ONNX's operators; None for a program.
        inputs: What the file takes.
        outputs: What it gives.
        opened: By number of the input, the first sizes that were left open.
        stored: The norm layers in it, as `check` reads them.
        run: Runs it.
    """

    program: ExportedProgram
    opset: int | None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    opened: Mapping[int, torch.SymInt]
    stored: Stored
    run: Callable[[Call], list[Tensor]]


@contextlib.contextmanager
def exporting(what: str) -> Iterator[None]:
    """Turn what an exporter raises into one line, and keep what it prints to itself.

    Raises:
        ExportError: Something was raised.
        FileFormatError: The disk is full.
    """
    disabled = logging.root.manager.disable
    quiet = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        try:
            yield
        except ExportError:
            raise
        except Exception as error:
            raise _failed(what, error) from error
        finally:
            logging.disable(disabled)


# What is said where the first line of an error has one of the words.
_HELP = (
    (
        ("data-dependent", "DataDependent", "GuardOnDataDependent", "DynamicOutputShape"),
        "the forward branches on the value of a tensor: torch.where or torch.cond are what "
        "exporters can follow, or export the part without the branch, with forward=",
    ),
    (
        ("TreeSpec", "Unsupported input type", "serialization name"),
        "forward=lambda model, example: ... that takes and returns tensors in dicts, tuples, lists",
    ),
    (
        ("inference tensor",),
        "its tensors were made under torch.inference_mode: load its state dict into a model that "
        "was not",
    ),
)


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _failed(what: str, error: Exception) -> StillnormError:
    """Say what went wrong at the bottom of it."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
        return FileFormatError(
            f"the file cannot be written: {cause.strerror}", help="nothing was changed"
        )
    said = first_line(cause)
    fitting = (help for words, help in _HELP if any(word in said for word in words))
    return ExportError(
        f"{what} failed: {said[:300]}", help=next(fitting, "the cause of this exception says more")
    )
