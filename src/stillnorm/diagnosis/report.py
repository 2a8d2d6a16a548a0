"""What `check` found: the report, its fixes, its writers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.fixes import apply_all
from stillnorm.diagnosis.layout import lay_out
from stillnorm.diagnosis.runs import Head, Runs
from stillnorm.diagnosis.verdict import Verdict
from stillnorm.errors import FindingsError
from stillnorm.reports import text
from stillnorm.reports.document import Document, Severity
from stillnorm.reports.json import dumps
from stillnorm.reports.numbers import count
from stillnorm.tracing import first_tensor


@dataclass(frozen=True)
class Layer:
    """A norm layer in a few words: ``bn_6  BatchNorm2d(32)``."""

    path: str
    kind: str
    num_features: int


@dataclass(frozen=True)
class Data:
    """What was run.

    Args:
        batches: How many batches were read.
        total: How many there are, where a DataLoader says.
        batch_size: Samples in the first.
        samples: Samples in all.
        device: Where the batches live.
    """

    batches: int
    total: int | None
    batch_size: int
    samples: int
    device: str

    @classmethod
    def describe(cls, runs: Runs) -> Data:
        """Describe the batches that were run."""
        return cls(
            batches=len(runs.batches),
            total=runs.total,
            batch_size=runs.batch_sizes[0],
            samples=sum(runs.batch_sizes),
            device=str(first_tensor(runs.batches[0]).device),
        )


@dataclass(frozen=True)
class NotRun:
    """A rule that was not run, or could not tell, and why."""

    code: str
    reason: str


@dataclass(frozen=True)
class Crash:
    """A rule that raised. The others' findings stand."""

    code: str
    error: str


@dataclass(frozen=True)
class Applied:
    """The fixes that `Report.fix` applied.

    Args:
        fixes: Pairs of the finding's code and its fix.
    """

    fixes: tuple[tuple[str, Fix], ...]
    _undo: Callable[[], None] = field(repr=False)

    def undo(self) -> None:
        """Take the fixes back. Gradients that a freeze dropped stay dropped."""
        self._undo()


@dataclass(frozen=True)
class Report:
    """What `check` found.

    Args:
        model: The class of the model.
        layers: Its norm layers.
        findings: What is wrong, errors first.
        not_run: What was not checked, and why.
        crashed: Rules that failed themselves; tell us.
        head: The score in eval mode, with batch statistics, recalibrated; None without `score`.
        verdict: Freeze, recalibrate or train; None without batches.
        data: What was run; None without batches.
        seconds: How long it took.
    """

    model: str
    layers: tuple[Layer, ...]
    findings: tuple[Finding, ...]
    not_run: tuple[NotRun, ...]
    crashed: tuple[Crash, ...]
    head: Head | None
    verdict: Verdict | None
    data: Data | None
    seconds: float
    _evidence: Evidence = field(repr=False)

    def fix(self, unsafe: bool = False) -> Applied:
        """Apply the fixes: all of them, or on any exception none.

        Args:
            unsafe: Apply also those that change the eval output or the training, or estimate
                statistics from the batches that `check` was given.

        Returns:
            What was applied, with `.undo()`.

        Mutates:
            The model, as each fix says.
        """
        chosen = tuple(
            (finding.code, finding.fix)
            for finding in self.findings
            if finding.fix is not None and (unsafe or finding.fix.applicability == "safe")
        )
        undo = apply_all((fix for _, fix in chosen), self._evidence)
        return Applied(chosen, undo)

    def raise_for(self, severity: Severity = "error") -> None:
        """Raise when there is a finding of this severity or worse.

        Raises:
            FindingsError: There is.
        """
        found = [finding for finding in self.findings if finding.at_least(severity)]
        if found:
            first = found[0]
            raise FindingsError(
                f"{count(len(found), 'finding')} of severity {severity} or worse in {self.model}: "
                f"{first.code} {first.slug}: {first.message}",
                help="print the report",
            )

    def to_json(self) -> str:
        """Return the report as JSON, without the parts that only lay out what is there already."""
        bare = tuple(replace(finding, table=None) for finding in self.findings)
        return dumps(replace(self, findings=bare))

    def document(self, verbose: bool = False) -> Document:
        """Return the report as a document: three findings open, or with `verbose` all of them."""
        return lay_out(self, verbose)

    def __str__(self) -> str:
        return text.write(self.document())
