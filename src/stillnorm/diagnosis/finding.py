"""What a rule reports, and what would repair it: plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from stillnorm.reports.document import Severity, Table
from stillnorm.tracing import Site

Applicability = Literal["safe", "unsafe"]
Action = Literal[
    "clone",
    "drop gradients",
    "replace",
    "float32",
    "convert",
    "absorb",
    "track",
    "split",
    "momentum",
    "pool",
    "recalibrate",
    "recalibrate and freeze",
    "freeze",
]
_FROM_DATA = ("absorb", "track", "split", "recalibrate", "recalibrate and freeze")

SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")  # worst first


@dataclass(frozen=True)
class Fix:
    """A change to the model that makes a finding go away.

    It is safe when the eval output and the `state_dict` keys stay, it can be undone, it needs no
    data, *and* training then does what the user's own flags already declare. Everything else that
    can be applied is unsafe. Advice that nobody can apply is the finding's `help`.

    Args:
        title: What it does, in words: "hold the statistics".
        applicability: ``"safe"`` or ``"unsafe"``.
        action: Which change; `fixes.py` does it.
        paths: The layers that it changes.
        option: What else the change has to be told, as `fixes.py` says.
        measured: The user's score in eval mode with this fix alone, where that was tried.
    """

    title: str
    applicability: Applicability
    action: Action
    paths: tuple[str, ...]
    option: str | float | None = None
    measured: float | None = None

    @property
    def needs_data(self) -> bool:
        """Whether it runs the model on the batches that `check` was given."""
        return self.action in _FROM_DATA


@dataclass(frozen=True)
class Finding:
    """One fact about a model, found by one rule; it may be about several layers.

    Args:
        code: The rule's code, ``"SN201"``.
        slug: The rule's name, ``"shared-layer"``.
        severity: ``"error"``: results are or will be silently wrong. ``"warning"``: measurable
            loss. ``"info"``: waste or advice.
        paths: The layers, the most telling first.
        message: What is the case; never what to do about it.
        evidence: The numbers it rests on, by name.
        note: A fact beside the message.
        also: Further layers with the same fault, in words.
        explains: Symptoms that this is the cause of and that are therefore not reported.
        help: What the user can change.
        fix: What stillnorm can change.
        where: Source lines of the calls, ``"net.py:31"``.
        sites: The same lines with their files' paths.
        table: The evidence laid out for reading.
        fingerprint: The same in every run for the same rule and layers, whatever the numbers are.
    """

    code: str
    slug: str
    severity: Severity
    paths: tuple[str, ...]
    message: str
    evidence: Mapping[str, object] = field(default_factory=dict)
    note: str = ""
    also: str = ""
    explains: str = ""
    help: str = ""
    fix: Fix | None = None
    where: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    table: Table | None = None
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        told = "\0".join((self.code, *sorted(self.paths)))
        digest = hashlib.sha256(told.encode(errors="surrogatepass")).hexdigest()
        object.__setattr__(self, "fingerprint", digest[:16])

    def at_least(self, severity: Severity) -> bool:
        """Tell whether the finding is as severe as `severity`, or worse."""
        return SEVERITIES.index(self.severity) <= SEVERITIES.index(severity)


def source_lines(where: tuple[str, ...]) -> str:
    """Write source lines with each file named once.

    Example:
        >>> source_lines(("net.py:31", "net.py:33", "head.py:8"))
        'net.py:31, 33, head.py:8'
    """
    shown, last = [], ""
    for site in where:
        file, _, line = site.rpartition(":")
        shown.append(line if file == last else site)
        last = file
    return ", ".join(shown)


def named(path: str) -> str:
    """Write a path; the model itself has none."""
    return path or "(root)"


def listed(paths: Sequence[str], most: int = 3) -> str:
    """Write the first few paths, and how many more there are.

    Example:
        >>> listed(["bn1", "bn2", "bn3", "bn4"])
        'bn1, bn2, bn3 and 1 more'
    """
    shown = ", ".join(map(named, paths[:most]))
    return shown if len(paths) <= most else f"{shown} and {len(paths) - most} more"
