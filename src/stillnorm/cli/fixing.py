"""`check --fix`: apply the fixes, look again, write the model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillnorm.cli.options import working
from stillnorm.cli.weights import few
from stillnorm.errors import StillnormWarning
from stillnorm.reports.numbers import count

if TYPE_CHECKING:
    from torch import nn

    from stillnorm.diagnosis import Report

_HOLDS = ("freeze", "recalibrate and freeze")
_ROUNDS = 3


def fixed(report: Report, look: Callable[[], Report], *, unsafe: bool) -> Report:
    """Apply a report's fixes to its model; return what is found then, with what went away.

    A cause that is gone can leave symptoms that it explained: they are fixed in the next round.

    Args:
        report: What was found, without what is not to be reported.
        look: Checks the model again, and leaves out the same.
        unsafe: Whether to apply the unsafe ones too.
    """
    from stillnorm.diagnosis.report import Fixed

    done: list[Fixed] = []
    for again in range(_ROUNDS):
        if again and not any(finding.at_least("warning") for finding in report.findings):
            break  # what is uncovered and only advice was not announced
        with working("fixing"), _warnings_told():
            applied = report.fix(unsafe=unsafe)
        if not applied.fixes:
            break
        report = look()
        remaining = {(finding.code, path) for finding in report.findings for path in finding.paths}
        gone = [
            Fixed(code, fix)
            for code, fix in applied.fixes
            if not any((code, path) in remaining for path in fix.paths)
        ]
        done += gone
        if not gone:
            break
    return replace(report, fixed=tuple(done))


@contextlib.contextmanager
def _warnings_told() -> Iterator[None]:
    """Say stillnorm's warnings in its own words, without the line of its code that gave them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StillnormWarning)
        yield
    for warning in caught:
        click.echo(f"warning: {warning.message}", err=True)


def write_model(model: nn.Module, keys_before: list[str], report: Report, out: Path) -> None:
    """Write the fixed model's tensors, and say on stderr what the file cannot do.

    Args:
        model: The model.
        keys_before: The keys of its `state_dict` before.
        report: What was fixed.
        out: The file.
    """
    from stillnorm.diagnosis.fixing.fix_calls import call_of
    from stillnorm.norms import find_norms
    from stillnorm.state.files import write_tensors

    with working(f"writing {out.name}"):
        state = model.state_dict()
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
        if fix.action in _HOLDS:
            again = call_of(replace(fix, action="freeze"), find_norms(model))
        elif fix.action == "momentum":
            again = "set momentum m to 1 - m where the layers are made"
        else:
            continue
        click.echo(
            f"no tensor holds it, so not in the file: {fix.title}, "
            f"{count(len(fix.paths), 'layer')}\n  help: after loading it: {again}",
            err=True,
        )
