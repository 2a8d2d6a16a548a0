"""The report of `check` as a document: the measured head first, then one finding per cause."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from stillnorm.diagnosis.evidence.runs import Head
from stillnorm.diagnosis.finding import Finding, listed, named, source_lines
from stillnorm.diagnosis.verdict import in_units
from stillnorm.diagnosis.writing.summary import COMMAND_LINE, PYTHON, Wording, summary
from stillnorm.reports.document import Block, Diagnostic, Document, Line, Span, Table
from stillnorm.reports.numbers import count

if TYPE_CHECKING:
    from stillnorm.diagnosis.report import Report

OPEN = 3  # findings shown in full; the rest take a line each
LINES = 6


def lay_out(report: Report, verbose: bool, wording: Wording = PYTHON) -> Document:
    """Return the report as a document."""
    blocks: list[Block] = []
    if report.head is not None:
        blocks += [Line(""), _head(report, report.head)]
    blocks += _gap(report)
    shown = [f for f in report.findings if verbose or f.severity != "info"]
    opened = shown if verbose else shown[:OPEN]
    blocks += [_diagnostic(report, finding) for finding in opened]
    blocks += [_one_line(finding) for finding in shown[len(opened) :]]
    blocks += [Line(""), *summary(report, verbose, wording)]
    return Document(_title(report), tuple(blocks))


def overview(report: Report) -> Document:
    """Return the report with what was found in a table first, then all of it."""
    blocks: list[Block] = [] if report.head is None else [_head(report, report.head)]
    blocks += _gap(report)
    blocks += [Line(""), *summary(report, verbose=True, wording=COMMAND_LINE), Line("")]
    if report.findings:
        rows = tuple(
            (
                finding.severity,
                f"{finding.code} {finding.slug}",
                listed(finding.paths),
                finding.message,
            )
            for finding in report.findings
        )
        blocks.append(Table(("", "rule", "layers", "finding"), rows, "llll"))
    blocks += [_diagnostic(report, finding) for finding in report.findings]
    return Document(_title(report), tuple(blocks))


def _title(report: Report) -> str:
    kinds = Counter(layer.kind for layer in report.layers)
    norms = ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "no norm layers"
    if report.file:  # it tells no classes
        norms = f"{report.file}, {count(len(report.layers), 'norm layer')}"
    parts = [f"{report.model}: {norms}"]
    if (data := report.data) is not None:
        of = "" if data.total in (None, data.batches) else f" of {data.total}"
        batches = f"{data.batches}{of} batches" if data.batches > 1 else f"1{of} batch"
        parts += [f"{batches} of {data.batch_size}", data.device]
    return ", ".join([*parts, f"{report.seconds:.1f} s"])


def _gap(report: Report) -> list[Block]:
    """Say which layers and causes make eval and batch statistics disagree."""
    if report.gap is None:
        return []
    return [Line(""), Line(report.gap.sizes(), indent=2), Line(report.gap.verdict(), indent=2)]


def _head(report: Report, head: Head) -> Table:
    """Lay out the three scores; the worst one stands out."""
    rows: list[tuple[str, float, str]] = [
        ("eval (running statistics)", head.eval, "what you ship"),
        ("batch statistics", head.batch, "what you trained"),
    ]
    if head.recalibrated is not None:
        aside = _cause(head, head.recalibrated)
        if aside and any(finding.code == "SN106" for finding in report.findings):
            aside = "with an input that is not the one of training (SN106)"
        rows.append(("recalibrated", head.recalibrated, aside))
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
        names = named(paths[0])
        if (layer := next((x for x in report.layers if x.path == paths[0]), None)) is not None:
            names += f"  {layer.kind}({layer.num_features})"
    else:
        names = listed(finding.paths)
    more = f" and {len(finding.where) - LINES} more" if len(finding.where) > LINES else ""
    return f"{names}   {source_lines(finding.where[:LINES])}{more}".rstrip()


def _fix(report: Report, finding: Finding) -> str:
    if (fix := finding.fix) is None:
        return ""
    if not fix.needs_data:
        return f"({fix.applicability}) {fix.title}"
    head = report.head
    measured = ""
    if head is not None and fix.measured is not None:
        before, after = in_units(head.eval, head), in_units(fix.measured, head)
        measured = f", measured: eval {before} -> {after}"
    return f"({fix.applicability}, estimated from these batches) {fix.title}{measured}"


def _one_line(finding: Finding) -> Line:
    severity = Span(finding.severity, finding.severity)
    return Line((severity, f"[{finding.code}] {finding.slug}: {finding.message}"))
