"""The report of `check` as a document: the measured head first, then one finding per cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stillnorm.diagnosis.finding import Finding, source_lines
from stillnorm.diagnosis.runs import Head
from stillnorm.diagnosis.verdict import in_units
from stillnorm.reports.document import Block, Diagnostic, Document, Line, Span, Table
from stillnorm.reports.numbers import count

if TYPE_CHECKING:
    from stillnorm.diagnosis.report import Report

OPEN = 3  # findings shown in full; the rest take a line each
PATHS = 3
LINES = 6


def lay_out(report: Report, verbose: bool) -> Document:
    """Return the report as a document."""
    blocks: list[Block] = []
    if report.head is not None:
        blocks += [Line(""), _head(report.head)]
    shown = [f for f in report.findings if verbose or f.severity != "info"]
    opened = shown if verbose else shown[:OPEN]
    blocks += [_diagnostic(report, finding) for finding in opened]
    blocks += [_one_line(finding) for finding in shown[len(opened) :]]
    blocks += [Line(""), *_summary(report, verbose)]
    return Document(_title(report), tuple(blocks))


def _title(report: Report) -> str:
    kinds = Counter(layer.kind for layer in report.layers)
    norms = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "no norm layers"
    parts = [f"{report.model}: {norms}"]
    if (data := report.data) is not None:
        of = "" if data.total in (None, data.batches) else f" of {data.total}"
        batches = f"{data.batches}{of} batches" if data.batches > 1 else f"1{of} batch"
        parts += [f"{batches} of {data.batch_size}", data.device]
    return ", ".join([*parts, f"{report.seconds:.1f} s"])


def _head(head: Head) -> Table:
    """Lay out the three scores; the worst one stands out."""
    rows: list[tuple[str, float, str]] = [
        ("eval (running statistics)", head.eval, "what you ship"),
        ("batch statistics", head.batch, "what you trained"),
    ]
    if head.recalibrated is not None:
        rows.append(("recalibrated", head.recalibrated, _cause(head, head.recalibrated)))
    worst = min(value for _, value, _ in rows)
    stands_out = worst < max(value for _, value, _ in rows)
    return Table(
        (),
        tuple(
            (
                label,
                Span(in_units(value, head), "error" if stands_out and value == worst else ""),
                aside,
            )
            for label, value, aside in rows
        ),
        "lrl",
        indent=2,
        gap=3,
    )


def _cause(head: Head, recalibrated: float) -> str:
    """Say whether stale statistics account for the gap between eval and batch statistics."""
    gap, closed = head.batch - head.eval, recalibrated - head.eval
    if not head.matters(gap):
        return ""
    if closed >= 0.8 * gap:
        return "so stale statistics are the cause"
    if closed <= 0.2 * gap:
        return "so stale statistics are not the cause"
    return "so stale statistics are part of the cause"


def _diagnostic(report: Report, finding: Finding) -> Diagnostic:
    notes = [
        ("also", finding.also),
        ("note", finding.note),
        ("explains", finding.explains),
        ("help", finding.help),
        ("fix", _fix(report, finding)),
    ]
    return Diagnostic(
        finding.severity,
        finding.code,
        finding.slug,
        finding.message,
        where=(_where(report, finding),),
        evidence=finding.table,
        notes=tuple((label, text) for label, text in notes if text),
    )


def _where(report: Report, finding: Finding) -> str:
    """Write "bn_6  BatchNorm2d(32)   net.py:31, net.py:33", or the first paths of several."""
    paths = finding.paths
    if len(paths) == 1 or finding.also:
        names = _name(paths[0])
        if (layer := next((x for x in report.layers if x.path == paths[0]), None)) is not None:
            names += f"  {layer.kind}({layer.num_features})"
    else:
        names = ", ".join(_name(path) for path in paths[:PATHS])
        names += f" and {len(paths) - PATHS} more" if len(paths) > PATHS else ""
    more = f" and {len(finding.where) - LINES} more" if len(finding.where) > LINES else ""
    return f"{names}   {source_lines(finding.where[:LINES])}{more}".rstrip()


def _name(path: str) -> str:
    return path or "(root)"


def _fix(report: Report, finding: Finding) -> str:
    if (fix := finding.fix) is None:
        return ""
    if not fix.needs_data:
        return f"({fix.applicability}) {fix.title}"
    head = report.head
    measured = ""
    if head is not None and head.recalibrated is not None:
        before, after = in_units(head.eval, head), in_units(head.recalibrated, head)
        measured = f", measured: eval {before} -> {after}"
    return f"({fix.applicability}, estimated from these batches) {fix.title}{measured}"


def _one_line(finding: Finding) -> Line:
    severity = Span(finding.severity, finding.severity)
    return Line((severity, f"[{finding.code}] {finding.slug}: {finding.message}"))


def _summary(report: Report, verbose: bool) -> Iterator[Line]:
    n = Counter(finding.severity for finding in report.findings)
    numbers = ((n["error"], "error"), (n["warning"], "warning"), (n["info"], "note"))
    found = [count(number, noun) for number, noun in numbers if number]
    line = ", ".join(found) or "nothing found"
    if n["info"] and not verbose:
        line += " (--verbose)"
    safe, unsafe = _fixes(report, "safe"), _fixes(report, "unsafe")
    if safe:
        line += f". {count(safe, 'safe fix')}: report.fix()"
    if unsafe:
        line += f". {count(unsafe, 'unsafe fix')}: report.fix(unsafe=True)"
    yield Line(line)
    if report.verdict is not None:
        yield Line(f"verdict: {report.verdict.sentence}")
    reasons: dict[str, list[str]] = {}
    for missed in report.not_run:
        reasons.setdefault(missed.reason, []).append(missed.code)
    for reason, codes in reasons.items():
        which = ", ".join(codes) if verbose or len(codes) == 1 else count(len(codes), "rule")
        yield Line(f"not run: {which}: {reason}")
    for crash in report.crashed:
        yield Line((Span("internal", "error"), f": {crash.code} failed itself: {crash.error}"))


def _fixes(report: Report, applicability: str) -> int:
    fixes = [finding.fix for finding in report.findings if finding.fix is not None]
    return sum(fix.applicability == applicability for fix in fixes)
