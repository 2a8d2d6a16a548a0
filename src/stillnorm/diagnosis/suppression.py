"""What is not to be reported, because somebody has looked at it and accepts it.

A finding about several layers stays for those that nobody named; its fix then leaves the others
alone. What is taken out of a report is kept beside its findings, to be counted and read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from stillnorm.diagnosis.codes import lookup
from stillnorm.diagnosis.finding import Finding, listed
from stillnorm.diagnosis.report import Report, Suppressed
from stillnorm.diagnosis.verdict import judge
from stillnorm.norms.select import globs

Accepted = Callable[[Finding, str], str | None]


@dataclass(frozen=True)
class Ignore:
    """Rules that are ignored at some layers.

    Args:
        pattern: Which layers, as in `layers=`: ``"backbone.*"``, and all that lies below.
        rules: Codes, beginnings of codes, or slugs.
        reason: Why.
    """

    pattern: str
    rules: tuple[str, ...]
    reason: str = ""


def ignoring(report: Report, ignores: Iterable[Ignore], by: str) -> Report:
    """Return the report without what is ignored at its layers.

    Args:
        report: What was found.
        ignores: What to leave out.
        by: Where that is written, for the reader: ``"pyproject.toml"``.

    Raises:
        RuleError: One of them names no rule.
    """
    told = [
        (ignore.pattern, {rule.code for name in ignore.rules for rule in lookup(name)}, ignore)
        for ignore in ignores
    ]

    def accepted(finding: Finding, path: str) -> str | None:
        for pattern, codes, ignore in told:
            if finding.code in codes and globs(path, pattern):
                return ignore.reason
        return None

    return without(report, accepted, by)


def without(report: Report, accepted: Accepted, by: str) -> Report:
    """Return the report without what is accepted; the verdict is drawn from the rest.

    Args:
        report: What was found.
        accepted: Asked for a finding and each of its paths (``""`` for one about no layer): the
            reason, perhaps empty, for which it is accepted there; None where it is not.
        by: Who accepts it.
    """
    left: list[Finding] = []
    hidden: list[Suppressed] = []
    for finding in report.findings:
        reasons = {path: accepted(finding, path) for path in finding.paths or ("",)}
        rest = tuple(path for path, reason in reasons.items() if reason is None)
        if rest:
            left.append(finding if len(rest) == len(reasons) else _about(finding, rest, by))
        by_reason: dict[str, list[str]] = {}
        for path, reason in reasons.items():
            if reason is not None:
                by_reason.setdefault(reason, []).append(path)
        hidden += [
            Suppressed(finding.code, tuple(paths), by, reason, whole=not rest)
            for reason, paths in by_reason.items()
        ]
    if not hidden:
        return report
    return replace(
        report,
        findings=tuple(left),
        suppressed=(*report.suppressed, *hidden),
        verdict=judge(report._evidence, left),
    )


def _about(finding: Finding, paths: tuple[str, ...], by: str) -> Finding:
    """Return the finding about some of its layers. Its message and numbers are those of all."""
    others = tuple(path for path in finding.paths if path not in paths)
    note = f"of these layers {len(others)} are suppressed by {by}: {listed(others)}"
    fix = finding.fix
    if fix is not None:
        kept = tuple(path for path in fix.paths if path not in others)
        fix = replace(fix, paths=kept) if kept else None
    return replace(
        finding,
        paths=paths,
        note=f"{finding.note}; {note}" if finding.note else note,
        fix=fix,
    )
