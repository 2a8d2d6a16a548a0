"""Annotations of GitHub Actions: findings beside the line of code that they are about.

Source: https://docs.github.com/actions, "Workflow commands"; what is escaped is what the runner's
`toolkit/packages/core/src/command.ts` unescapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stillnorm.reports.document import Severity

_COMMANDS: dict[Severity, str] = {"error": "error", "warning": "warning", "info": "notice"}


@dataclass(frozen=True)
class Annotation:
    """One annotation.

    Args:
        severity: How it is marked.
        title: Its headline.
        message: Its text, several lines perhaps.
        file: The file's path from the root of the repository; none for one about the whole run.
        line: The line in it.
    """

    severity: Severity
    title: str
    message: str
    file: str = ""
    line: int = 0


def write(annotations: Iterable[Annotation]) -> str:
    """Write annotations as workflow commands, one a line.

    Example:
        >>> print(write([Annotation("error", "SN201 shared-layer", "100 %, twice", "net.py", 31)]))
        ::error file=net.py,line=31,title=SN201 shared-layer::100 %25, twice
    """
    return "\n".join(_command(annotation) for annotation in annotations)


def _command(annotation: Annotation) -> str:
    place = {"file": annotation.file, "line": str(annotation.line)} if annotation.file else {}
    properties = ",".join(
        f"{name}={_property(value)}" for name, value in {**place, "title": annotation.title}.items()
    )
    return f"::{_COMMANDS[annotation.severity]} {properties}::{_data(annotation.message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
