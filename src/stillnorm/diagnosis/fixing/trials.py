"""What a fix would bring: done, scored and taken back before it is offered."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.runs import scored_in_eval
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.fixing.fixes import apply_all
from stillnorm.errors import StillnormError
from stillnorm.state import preserved
from stillnorm.tracing import first_line


def tried(findings: Iterable[Finding], evidence: Evidence) -> list[Finding]:
    """Return the findings with what each fix that needs data brings in the user's score.

    A fix that turns out to be impossible is not offered, and the finding says why.

    Cost:
        For each such fix what it costs, and one eval forward over the batches. Recalibration has
        been measured already; fixes of mere remarks are not tried.
    """
    return [_tried(finding, finding.fix, evidence) for finding in findings]


def _tried(finding: Finding, fix: Fix | None, evidence: Evidence) -> Finding:
    head = None if evidence.runs is None else evidence.runs.head
    if fix is None or not fix.needs_data or head is None or finding.severity == "info":
        return finding
    if fix.action == "recalibrate":
        return replace(finding, fix=replace(fix, measured=head.recalibrated))
    try:
        with preserved(evidence.model), torch.no_grad():
            undo = apply_all([fix], evidence)
            try:
                measured = scored_in_eval(evidence.request, evidence.measured)
            finally:
                undo()
    except StillnormError as error:
        reason = f"no fix is offered: {first_line(error).partition(': ')[2]}"
        note = f"{finding.note}; {reason}" if finding.note else reason
        return replace(finding, fix=None, note=note)
    return replace(finding, fix=replace(fix, measured=measured))
