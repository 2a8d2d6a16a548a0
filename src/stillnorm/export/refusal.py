"""What speaks against exporting a model, as `check` finds it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

from torch import nn

from stillnorm.diagnosis import Finding, check
from stillnorm.diagnosis.finding import listed
from stillnorm.errors import ExportError
from stillnorm.tracing import Forward

_AGAINST = ("SN007", "SN102", "SN103", "SN107")


def must_be_exportable(
    model: nn.Module, example: object, forward: Forward, reached: Collection[str]
) -> None:
    """Raise where no file could be right.

    Args:
        model: The model.
        example: Two samples or more: one alone does not show what depends on the batch.
        forward: ``(model, example) -> output``.
        reached: The layers that the example reaches; others are not in the file.

    Raises:
        ExportError: The eval output depends on what else is in the batch, or statistics are not
            finite, or negative.
    """
    report = check(model, iter([example]), forward=forward, select=_AGAINST)
    against = [f for f in report.findings if _is_about(f, reached)]
    if against:
        raise _refusal(against)


def _is_about(finding: Finding, reached: Collection[str]) -> bool:
    if finding.code == "SN007":  # of what ran; but for a train() that returns nothing
        return finding.evidence.get("kind") != "no return"
    return not set(reached).isdisjoint(finding.paths)


def must_not_use_the_batch(file: Path) -> None:
    """Raise when a norm in a file normalises by the batch.

    Raises:
        ExportError: One does.
    """
    if findings := check(file, select="SN701").findings:
        raise _refusal(findings)


def _refusal(findings: Iterable[Finding]) -> ExportError:
    """Return the error that tells the findings, the first of them in full."""
    first, *others = findings
    more = f" (and {', '.join(finding.code for finding in others)})" if others else ""
    return ExportError(
        f"{first.code} {first.slug}: {first.message}: {listed(first.paths)}{more}",
        help=first.help,
        findings=(first, *others),
    )
