"""The report of `check` in the form that was asked for: on stdout, and in files."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillnorm.cli import targets
from stillnorm.cli.options import as_text, working

if TYPE_CHECKING:
    from stillnorm.diagnosis import Report

FORMATS = ("text", "json", "markdown", "github", "html")
_ENDINGS = {".html": "html", ".htm": "html", ".json": "json", ".md": "markdown", ".txt": "text"}


def form_of(file: Path, format: str) -> str:
    """Return the form of a file: what its ending says; without one, `--format`.

    Raises:
        click.BadParameter: The ending is none of ours.
    """
    if file.suffix and file.suffix.lower() not in _ENDINGS:
        raise click.BadParameter(
            f"{file.name}: no report ends in {file.suffix}; one of {', '.join(_ENDINGS)}",
            param_hint="--output",
        )
    return _ENDINGS.get(file.suffix.lower(), format)


def must_not_replace(outputs: Sequence[Path], given: Sequence[str | Path | None]) -> None:
    """Say now, not after the work, that a report would take the place of what else was named.

    Args:
        outputs: The files of the report.
        given: Other files, and targets: their files.

    Raises:
        click.BadParameter: They are the same file, perhaps by a link.
    """
    for file in outputs:
        for other in (name for name in given if name is not None):
            if any(_is_same(file, name) for name in (Path(other), targets.file_of(str(other)))):
                raise click.BadParameter(
                    f"{file} is {other}: a report must not take its place", param_hint="--output"
                )


def _is_same(file: Path, other: Path) -> bool:
    try:
        return file.samefile(other)
    except (OSError, ValueError):  # one of them is not there yet
        return os.path.realpath(file) == os.path.realpath(other)


def write_report(report: Report, *, format: str, files: Sequence[Path], verbose: bool) -> None:
    """Write the report into files and on stdout; what a file has taken, stdout shows as text.

    Args:
        report: The report.
        format: The form on stdout.
        files: Where else to write it.
        verbose: Whether its text opens every finding.
    """
    from stillnorm.state.files import write_whole

    forms = [form_of(file, format) for file in files]
    shown = "text" if format in forms else format
    terminal = shown == "text" and sys.stdout.isatty()
    with working("writing the report"):  # a page runs the model
        for file, form in zip(files, forms, strict=True):
            write_whole(file, (_written(report, form, verbose) + "\n").encode())
        said = _written(report, shown, verbose, terminal=terminal)
    if said:
        click.echo(said)


def _written(report: Report, form: str, verbose: bool, *, terminal: bool = False) -> str:
    match form:
        case "json":
            return report.to_json()
        case "markdown":
            return report.to_markdown()
        case "github":
            workspace = os.environ.get("GITHUB_WORKSPACE")
            return report.to_github(Path(workspace) if workspace else None)
        case "html":
            return report.to_html()
        case _:
            document = report.document(verbose=verbose, command_line=True)
            return as_text(document, terminal=terminal)
