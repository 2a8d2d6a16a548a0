"""Findings as annotations of GitHub Actions, at the lines that call the layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stillnorm.diagnosis.finding import Finding, listed
from stillnorm.reports.github import Annotation

if TYPE_CHECKING:
    from stillnorm.diagnosis.report import Report


def annotate(report: Report, root: Path) -> list[Annotation]:
    """Return the findings as annotations, each at the first of its lines that lies below `root`.

    A rule that failed is one too: the exit code alone would not say why.
    """
    failed = [
        Annotation("error", "stillnorm", f"internal: {crash.code} failed itself: {crash.error}")
        for crash in report.crashed
    ]
    return [*(_annotation(finding, root.resolve()) for finding in report.findings), *failed]


def _annotation(finding: Finding, root: Path) -> Annotation:
    details = [("layers", listed(finding.paths)), ("note", finding.note), ("help", finding.help)]
    message = "\n".join([finding.message, *(f"{label}: {text}" for label, text in details if text)])
    title = f"{finding.code} {finding.slug}"
    for site in finding.sites:
        file = Path(site.file).resolve()
        if file.is_relative_to(root):
            place = file.relative_to(root).as_posix()
            return Annotation(finding.severity, title, message, place, site.line)
    return Annotation(finding.severity, title, message)
