"""The end of `check`'s report: what was found in numbers, the verdict, what was not looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stillnorm.diagnosis.codes import CODES
from stillnorm.diagnosis.finding import listed
from stillnorm.reports.document import Line, Span
from stillnorm.reports.numbers import count

if TYPE_CHECKING:
    from stillnorm.diagnosis.report import Report

NEEDS = "needs "  # what a rule lacks begins so


@dataclass(frozen=True)
class Wording:
    """How the reader of a report would ask for what it names.

    Args:
        fix: The safe fixes.
        fix_unsafe: All fixes.
        verbose: Every finding, open.
        options: What rules need, where it is called otherwise than in `NotRun`.
    """

    fix: str
    fix_unsafe: str
    verbose: str
    options: Mapping[str, str]


PYTHON = Wording("report.fix()", "report.fix(unsafe=True)", "report.to_text(verbose=True)", {})
COMMAND_LINE = Wording(
    "--fix",
    "--fix --unsafe-fixes --out FILE",
    "--verbose",
    {
        "batches": "--data",
        "score=": "--score",
        "predict=": "--predict",
        "train_step=": "--train-step",
        "optimizer=": "--optimizer",
        "group=": "a process group",
        "a checkpoint file": "a checkpoint as TARGET",
    },
)


def summary(report: Report, verbose: bool, wording: Wording) -> Iterator[Line]:
    """Yield what was found in numbers, the verdict, and what was not looked at."""
    n = Counter(finding.severity for finding in report.findings)
    numbers = ((n["error"], "error"), (n["warning"], "warning"), (n["info"], "note"))
    found = [count(number, noun) for number, noun in numbers if number]
    line = ", ".join(found) or "nothing found"
    if n["info"] and not verbose:
        line += f" ({wording.verbose})"
    safe, unsafe = _fixes(report, "safe"), _fixes(report, "unsafe")
    if safe:
        line += f". {count(safe, 'safe fix')}: {wording.fix}"
    if unsafe:
        line += f". {count(unsafe, 'unsafe fix')}: {wording.fix_unsafe}"
    if report.fixed:
        titles = dict.fromkeys(f"{fixed.code} ({fixed.fix.title})" for fixed in report.fixed)
        yield Line(f"{len(report.fixed)} fixed: {', '.join(titles)}")
    yield Line(line)
    if report.verdict is not None:
        yield Line(f"verdict: {report.verdict.sentence}")
    yield from _suppressed(report, verbose)
    yield from _not_run(report, verbose, wording)
    for crash in report.crashed:
        yield Line(
            (
                Span("internal", "error"),
                f": {crash.code} failed itself: {crash.error}; please tell us",
            )
        )


def _suppressed(report: Report, verbose: bool) -> Iterator[Line]:
    """Say how many findings somebody has accepted, and where; with `verbose` which and why."""
    whole = Counter(hidden.by for hidden in report.suppressed if hidden.whole)
    if not verbose and whole:
        (by, n), *rest = whole.items()
        parts = [f"{count(n, 'finding')} suppressed by {by}", *(f"{n} by {by}" for by, n in rest)]
        yield Line(", ".join(parts))
    for hidden in report.suppressed if verbose else ():
        reason = f" ({hidden.reason})" if hidden.reason else ""
        yield Line(f"suppressed by {hidden.by}: {hidden.code} on {listed(hidden.paths)}{reason}")


def _not_run(report: Report, verbose: bool, wording: Wording) -> Iterator[Line]:
    """Say what the rules that did not run lack, and why others could not tell."""
    codes: dict[str, list[str]] = {}
    for missed in report.not_run:
        codes.setdefault(missed.reason, []).append(missed.code)
    lacking = [(r.removeprefix(NEEDS), c) for r, c in codes.items() if r.startswith(NEEDS)]
    lacking.sort(key=lambda group: -len(group[1]))
    parts: list[str] = []
    for what, which in lacking:
        rules = ", ".join(which) if verbose else str(len(which)) if parts else _rules(which)
        verb = "needs" if len(which) == 1 else "need"
        parts.append(f"{rules} {verb} {wording.options.get(what, what)}")
    told = [", ".join(parts)] if parts else []
    if previews := _previews(report):
        off = f"{count(len(previews), 'preview rule')} {'is' if len(previews) == 1 else 'are'} off"
        told.append(f"{off} ({', '.join(previews)})" if verbose else off)
    if told:
        yield Line(f"not run: {'; '.join(told)}")
    for reason, which in codes.items():
        if not reason.startswith(NEEDS):
            rules = ", ".join(which) if verbose or len(which) == 1 else _rules(which)
            yield Line(f"not run: {rules}: {reason}")


def _previews(report: Report) -> list[str]:
    """Return the rules that only their own names select, where all others were selected."""
    considered = {*report.ran, *(missed.code for missed in report.not_run)}
    considered |= {crash.code for crash in report.crashed}
    left = [code for code in CODES if code not in considered]
    return left if all(CODES[code].preview for code in left) else []


def _rules(codes: list[str]) -> str:
    return count(len(codes), "rule")


def _fixes(report: Report, applicability: str) -> int:
    fixes = [finding.fix for finding in report.findings if finding.fix is not None]
    return sum(fix.applicability == applicability for fix in fixes)
