"""The line of the user's code from which a norm layer was called."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

import torch

from stillnorm.tracing.calling import call

_NOT_THE_USERS = (
    os.path.dirname(torch.__file__) + os.sep,
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
)
_KERAS = os.sep + os.path.join("keras", "src", "")  # which nobody has to import to know it


@dataclass(frozen=True)
class Site:
    """A line of code.

    Args:
        file: The file's path.
        line: The line's number.
        function: The function it is in, qualified by its class.
    """

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{os.path.basename(self.file)}:{self.line}"


def calling_site() -> Site | None:
    """Return the nearest line on the stack that is neither torch's, Keras' nor stillnorm's.

    It is a line of the model, or of the user's `forward=`; None when torch alone lies between us
    and the norm, as in a model that is a bare `nn.Sequential`.
    """
    frame = sys._getframe(1)
    while frame.f_code is not call.__code__:
        code = frame.f_code
        if not code.co_filename.startswith(_NOT_THE_USERS) and _KERAS not in code.co_filename:
            return Site(code.co_filename, frame.f_lineno, code.co_qualname)
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None
