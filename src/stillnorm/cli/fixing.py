"""`check --fix`: apply the fixes, look again, write the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillnorm.cli.options import working
from stillnorm.cli.weights import few
from stillnorm.reports.numbers import count

if TYPE_CHECKING:
    from torch import nn

    from stillnorm.diagnosis import Fix, Report

_IN_THE_PROCESS = ("freeze", "recalibrate and freeze", "momentum")  # no tensor holds them


def fixed(report: Report, look: Callable[[], Report], *, unsafe: bool) -> Report:
    """Apply a report's fixes to its model; return what is found then, with what went away.

    Args:
        report: What was found, without what is not to be reported.
        look: Checks the model again, and leaves out the same.
        unsafe: Whether to apply the unsafe ones too.
    """
    from stillnorm.diagnosis.report import Fixed

    with working("fixing"):
        applied = report.fix(unsafe=unsafe)
    if not applied.fixes:
        return report
    left = look()
    remaining = {(finding.code, path) for finding in left.findings for path in finding.paths}
    gone = tuple(
        Fixed(code, fix)
        for code, fix in applied.fixes
        if not any((code, path) in remaining for path in fix.paths)
    )
    return replace(left, fixed=gone)


def write_model(model: nn.Module, keys_before: list[str], report: Report, out: Path) -> None:
    """Write the fixed model's tensors, and say on stderr what the file cannot do.

    Args:
        model: The model.
        keys_before: The keys of its `state_dict` before.
        report: What was fixed.
        out: The file.
    """
    from stillnorm.state.files import write_tensors

    state = model.state_dict()
    with working(f"writing {out.name}"):
        write_tensors(out, state, {})
    click.echo(f"the fixed model: {out}", err=True)
    new = [key for key in state if key not in keys_before]
    lost = [key for key in keys_before if key not in state]
    if new or lost:
        changed = " and ".join(
            f"{len(keys)} {what} ({few(keys)})"
            for keys, what in ((new, "new"), (lost, "gone"))
            if keys
        )
        click.echo(
            f"its keys are not those of your code: {changed}\n"
            "  help: change the code first, or repeat the fix there before you load the file",
            err=True,
        )
    for fix in (done.fix for done in report.fixed):
        if fix.action in _IN_THE_PROCESS:
            click.echo(
                f"not in the file: {fix.title} of {count(len(fix.paths), 'layer')}\n"
                f"  help: after loading it, {_in_code(fix)}",
                err=True,
            )


def _in_code(fix: Fix) -> str:
    """Return what to write in the training script for a fix that no tensor holds."""
    if fix.action == "momentum":
        return "set momentum m to 1 - m in the code that makes the layers"
    return f"sn.freeze(model, {list(fix.paths)!r})"
