"""What the page of a report says, as plain data; `reports.html` writes it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stillnorm.diagnosis.codes import CODES
from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.runs import Head
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.fixing.fix_calls import call_of
from stillnorm.diagnosis.writing.layer_view import NOISE, LayerView, view
from stillnorm.diagnosis.writing.layout import lay_out
from stillnorm.diagnosis.writing.normalized_values import FLOWS, REACH, normalized_values
from stillnorm.reports import Bar, Bars, Document, Span, Table
from stillnorm.reports.document import Diagnostic, plain
from stillnorm.reports.numbers import count

if TYPE_CHECKING:
    from stillnorm.diagnosis.report import Report

MOST_CHANNELS = 256  # drawn of one layer
ALL_CHANNELS = 32_000  # drawn of all layers: about two megabytes
_PYTHON = re.compile(r"(?<!`)\b(?:sn|report)\.[\w.]+\([^()`]*\)(?!`)")


@dataclass(frozen=True)
class Found:
    """A finding, and the layers that it is about, by their place."""

    diagnostic: Diagnostic
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Page:
    """The page of a report.

    Args:
        title: The class of the model.
        facts: What was run.
        head: The scores.
        verdict: Freeze, recalibrate or train.
        gap: What makes eval and batch statistics disagree, a line each.
        rules: How many rules ran.
        findings: What is wrong.
        fixes: The calls that apply what can be applied, with what they do.
        layers: The norm layers in order of the forward; those never called last.
        first: The place of the first that diverges.
        samples: How many samples the distances rest on.
        no_values: Why there are no histograms, if there are none.
        unchecked: Pairs of a reason and the rules that were not run for it.
        crashed: Pairs of a rule that failed itself and its error.
    """

    title: str
    facts: str
    head: Bars | None
    verdict: str
    gap: tuple[str, ...]
    rules: int
    findings: tuple[Found, ...]
    fixes: tuple[tuple[str, str], ...]
    layers: tuple[LayerView, ...]
    first: int | None
    samples: int
    no_values: str
    unchecked: tuple[tuple[str, tuple[str, ...]], ...]
    crashed: tuple[tuple[str, str], ...]

    @property
    def parts(self) -> tuple[Page, tuple[Diagnostic, ...], dict[str, object]]:
        """What `html.write_check` takes: the page, its findings, the data of its script."""
        diagnostics = tuple(found.diagnostic for found in self.findings)
        named = [{"code": d.code, "slug": d.slug, "severity": d.severity} for d in diagnostics]
        data: dict[str, object] = {
            "layers": self.layers,
            "first": self.first,
            "findings": named,
            "noise": NOISE,
            "reach": REACH,
            "no_values": self.no_values,
        }
        return self, diagnostics, data


def page_of(report: Report, evidence: Evidence) -> Page:
    """Gather what the page says. Runs the first batch twice for the histograms, if it can.

    Args:
        report: The report.
        evidence: What it rests on.
    """
    document = lay_out(report, verbose=True)
    title, _, facts = document.title.partition(": ")
    ordered = evidence.in_order(evidence.layers)
    spreads, no_values = normalized_values(evidence)
    places = {path: i for i, layer in enumerate(ordered) for path in layer.paths}
    about = [
        tuple(dict.fromkeys(places[path] for path in finding.paths if path in places))
        for finding in report.findings
    ]
    room = max(16, min(MOST_CHANNELS, ALL_CHANNELS // max(len(ordered), 1)))
    layers = tuple(
        view(
            evidence,
            layer,
            tuple(i for i, named in enumerate(about) if place in named),
            {flow: spreads[path] for flow in FLOWS if (path := (layer.path, flow)) in spreads},
            room,
        )
        for place, layer in enumerate(ordered)
    )
    return Page(
        title=title,
        facts=facts,
        head=_head(report.head, document),
        verdict="" if report.verdict is None else report.verdict.sentence,
        gap=() if report.gap is None else (report.gap.sizes(), report.gap.verdict()),
        rules=len(report.ran),
        findings=_findings(report, evidence, document, about),
        fixes=_fixes(report.findings),
        layers=layers,
        first=next((i for i, layer in enumerate(layers) if layer.diverges), None),
        samples=0 if report.data is None else report.data.samples,
        no_values=no_values,
        unchecked=_unchecked(report),
        crashed=tuple((crash.code, crash.error) for crash in report.crashed),
    )


# ------------------------------------------------------------------------------ the first screen


def _head(head: Head | None, document: Document) -> Bars | None:
    """Make bars of the scores, in the words of the text report."""
    if head is None:
        return None
    values = [v for v in (head.eval, head.batch, head.recalibrated) if v is not None]
    table = next(block for block in document.blocks if isinstance(block, Table))
    fractions = all(0 <= value <= 1 for value in values)
    bars = []
    for value, (label, shown, aside) in zip(values, table.rows, strict=True):
        style = shown.style if isinstance(shown, Span) else ""
        bars.append(Bar(plain(label), 100 * value if fractions else value, plain(aside), style))
    return Bars("your score", tuple(bars), "%" if fractions else "")


def _findings(
    report: Report, evidence: Evidence, document: Document, about: Sequence[tuple[int, ...]]
) -> tuple[Found, ...]:
    """Take the findings as the text report has them, each with the line to copy."""
    diagnostics = [block for block in document.blocks if isinstance(block, Diagnostic)]
    found = []
    for finding, shown, layers in zip(report.findings, diagnostics, about, strict=True):
        notes = list(shown.notes)
        if finding.fix is None:
            notes = [(label, _PYTHON.sub(r"`\g<0>`", text)) for label, text in notes]
        else:
            notes.append(("apply", f"`{call_of(finding.fix, evidence.layers)}`"))
        diagnostic = Diagnostic(
            shown.severity,
            shown.code,
            shown.slug,
            shown.message,
            shown.where,
            shown.evidence,
            tuple(notes),
        )
        found.append(Found(diagnostic, layers))
    return tuple(found)


def _fixes(findings: Sequence[Finding]) -> tuple[tuple[str, str], ...]:
    """Return how to apply the fixes: the safe ones, and all of them."""
    n = Counter(finding.fix.applicability for finding in findings if finding.fix is not None)
    fixes = []
    if n["safe"]:
        fixes.append(("report.fix()", f"applies {count(n['safe'], 'safe fix')}"))
    if n["unsafe"]:
        fixes.append(("report.fix(unsafe=True)", f"applies {_all_of(n['safe'], n['unsafe'])}"))
    return tuple(fixes)


def _all_of(safe: int, unsafe: int) -> str:
    alone = count(unsafe, "unsafe fix")
    return f"{alone} and the safe ones" if safe else alone


def _unchecked(report: Report) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return what was not looked at or is not told, by reason."""
    codes: dict[str, list[str]] = {}
    for missed in report.not_run:
        codes.setdefault(missed.reason, []).append(missed.code)
    considered = {*report.ran, *(missed.code for missed in report.not_run)}
    for code, rule in CODES.items():
        if rule.preview and code not in considered:
            codes.setdefault("preview: off unless selected", []).append(code)
    for hidden in report.suppressed:
        codes.setdefault(f"found, and accepted in {hidden.by}", []).append(hidden.code)
    return tuple((reason, tuple(map(_named, which))) for reason, which in codes.items())


def _named(code: str) -> str:
    rule = CODES.get(code)
    return code if rule is None else f"{code} {rule.slug}"
