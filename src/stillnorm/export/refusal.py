"""What speaks against exporting a model, as `check` finds it; only what the example reaches."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from stillnorm.diagnosis import Finding, check
from stillnorm.diagnosis.finding import listed
from stillnorm.errors import ExportError
from stillnorm.tracing import Forward, Trace, call_example, is_sharded, trace

_EVAL_BY_BATCH = ("SN007", "SN107")
_BROKEN = ("SN102", "SN103")


def must_be_exportable(model: nn.Module, example: object, forward: Forward | None) -> Trace:
    """Run the model on the example, and raise where no file could be right.

    Returns:
        What its norm layers did on the example in eval mode.

    Raises:
        ExportError: Its eval output depends on what else is in the batch, or the statistics are not
            finite or negative. Layers that the example does not reach are none of the file's.
        BatchError: The model cannot be called on the example.
    """
    if is_sharded(model):
        raise ExportError(
            "the model's weights are spread over ranks",
            help="gather its state dict and load it into a model of one process",
        )

    def call(model: nn.Module, example: object) -> object:
        return call_example(model, example, forward)

    seen = trace(model, [example], forward=call)
    report = check(model, [example], forward=call, select=[*_EVAL_BY_BATCH, *_BROKEN])
    against = [
        finding
        for finding in report.findings
        if finding.evidence.get("kind") != "no return"
        and (finding.code == "SN007" or seen.reached.intersection(finding.paths))
    ]
    if against:
        raise refusal(against)
    return seen


def must_not_use_the_batch(file: Path) -> None:
    """Raise when `check` finds a norm that normalises by the batch in the file.

    Raises:
        ExportError: It does.
    """
    findings = check(file, select="SN701").findings
    if findings:
        raise refusal(findings)


def refusal(findings: Iterable[Finding]) -> ExportError:
    """Return the error that tells the findings, the first of them in full."""
    first, *others = findings
    more = f" (and {', '.join(finding.code for finding in others)})" if others else ""
    return ExportError(
        f"not exported: {first.code} {first.slug}: {first.message}: {listed(first.paths)}{more}",
        help=first.help,
        findings=(first, *others),
    )
