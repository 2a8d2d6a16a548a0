"""Findings as annotations of GitHub Actions, at the lines that call the layers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from stillnorm.diagnosis.finding import Finding, listed
from stillnorm.reports.github import Annotation


def annotate(findings: Iterable[Finding], root: Path) -> list[Annotation]:
    """Return the findings as annotations, each at the first of its lines that lies below `root`."""
    return [_annotation(finding, root.resolve()) for finding in findings]


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
