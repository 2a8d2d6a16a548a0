"""The assertion that `check` finds nothing."""

from __future__ import annotations

from typing import Any

from torch import nn

from stillnorm.diagnosis import Report, check
from stillnorm.errors import FindingsError
from stillnorm.reports.document import Severity
from stillnorm.reports.numbers import count


def assert_healthy(
    model: nn.Module, batches: object = None, *, severity: Severity = "error", **options: Any
) -> Report:
    """Check a model, and fail where something is wrong with its norm layers.

    Args:
        model: The model.
        batches: The batches; without them only the rules run that need no forward. See `check`.
        severity: What fails: findings of this severity or worse.
        options: What else `check` takes: `score`, `predict`, `select`, `ignore`, ...

    Returns:
        The report, with the findings that were not bad enough.

    Raises:
        FindingsError: There are such findings; the message is the report. Or no rule could run,
            which proves nothing. It is an `AssertionError`.
        StillnormError: What `check` raises.

    Mutates:
        Nothing.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, momentum=0), nn.Linear(8, 2))
        >>> assert_healthy(net)
        Traceback (most recent call last):
        ...
        stillnorm.errors.FindingsError: 1 finding of severity error or worse
        ...
        >>> assert_healthy(net, ignore="zero-momentum-freeze").findings
        ()
    """
    report = check(model, batches, **options)
    if not report.ran:
        reasons = dict.fromkeys(missed.reason for missed in report.not_run)
        raise FindingsError(
            f"no rule ran, so nothing is proved: {', '.join(reasons) or 'all failed themselves'}"
        )
    found = [finding for finding in report.findings if finding.at_least(severity)]
    if found:
        raise FindingsError(
            f"{count(len(found), 'finding')} of severity {severity} or worse\n\n{report}"
        )
    return report
