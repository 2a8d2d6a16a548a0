"""What `check` found: the report, its fixes, its writers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.runs import Head, Runs
from stillnorm.diagnosis.finding import SEVERITIES, Finding, Fix, listed
from stillnorm.diagnosis.fixing.fixes import apply_all
from stillnorm.diagnosis.gap import Gap
from stillnorm.diagnosis.verdict import Verdict
from stillnorm.diagnosis.writing.annotations import annotate
from stillnorm.diagnosis.writing.layout import lay_out, overview
from stillnorm.diagnosis.writing.page import page_of
from stillnorm.diagnosis.writing.summary import COMMAND_LINE, PYTHON
from stillnorm.errors import FindingsError, RuleError
from stillnorm.reports import github, html, markdown, notebook, text
from stillnorm.reports.document import Document, Severity
from stillnorm.reports.json import dumps
from stillnorm.reports.numbers import count
from stillnorm.tracing import first_tensor

SCHEMA_VERSION = 1  # of the JSON; another one when a field goes or changes its meaning


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
class Suppressed:
    """A finding, or a part of one, that somebody has accepted.

    Args:
        code: Its rule.
        paths: The layers.
        by: Where that is written: ``"pyproject.toml"``, ``"baseline.json"``.
        reason: Why, where it says.
        whole: Whether nothing of the finding is left to report.
    """

    code: str
    paths: tuple[str, ...]
    by: str
    reason: str
    whole: bool


@dataclass(frozen=True)
class Fixed:
    """A finding that a fix has made go away."""

    code: str
    fix: Fix


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

    def __str__(self) -> str:
        done = [f"{code}: {fix.title}, {listed(fix.paths)}" for code, fix in self.fixes]
        return "\n".join(done) or "nothing was fixed"


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
        gap: Which layers and causes make eval and batch statistics disagree; None where they
            agree, or without batches.
        verdict: Freeze, recalibrate or train; None without batches.
        data: What was run; None without batches.
        seconds: How long it took.
        ran: Codes of the rules that ran and could tell.
        file: What `model` is where it names a file: "checkpoint"; empty for a model.
        suppressed: What was found and not to be reported.
        fixed: What was fixed before these findings were made.
    """

    model: str
    layers: tuple[Layer, ...]
    findings: tuple[Finding, ...]
    not_run: tuple[NotRun, ...]
    crashed: tuple[Crash, ...]
    head: Head | None
    gap: Gap | None
    verdict: Verdict | None
    data: Data | None
    seconds: float
    ran: tuple[str, ...] = field(default=(), kw_only=True)
    file: str = field(default="", kw_only=True)
    suppressed: tuple[Suppressed, ...] = field(default=(), kw_only=True)
    fixed: tuple[Fixed, ...] = field(default=(), kw_only=True)
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
            RuleError: There is no such severity.
        """
        if severity not in SEVERITIES:
            raise RuleError(
                f"there is no severity {severity!r}", help=f"one of {', '.join(SEVERITIES)}"
            )
        found = [finding for finding in self.findings if finding.at_least(severity)]
        if found:
            first = found[0]
            raise FindingsError(
                f"{count(len(found), 'finding')} of severity {severity} or worse in {self.model}: "
                f"{first.code} {first.slug}: {first.message}",
                help="print the report",
            )

    def to_json(self) -> str:
        """Return the report as JSON, as `docs/check.schema.json` describes it."""
        public = {f.name: getattr(self, f.name) for f in fields(self) if f.name[0] != "_"}
        public["findings"] = [
            {name: value for name, value in vars(finding).items() if name != "table"}
            for finding in self.findings
        ]
        return dumps({"schema_version": SCHEMA_VERSION} | public)

    def to_text(self, verbose: bool = False) -> str:
        """Return what `print` shows: three findings open, or with `verbose` all there is."""
        return text.write(self.document(verbose))

    def to_markdown(self) -> str:
        """Return the report for a pull request: an overview, and each finding to unfold."""
        return markdown.write(overview(self))

    def to_github(self, root: Path | None = None) -> str:
        """Return the findings as annotations of GitHub Actions, one a line.

        Args:
            root: The folder of the repository; by default the folder now.
        """
        return github.write(annotate(self, root or Path.cwd()))

    def to_html(self) -> str:
        """Return the report as one page that needs no other file and no network.

        It has what `print` shows, every layer and channel, and histograms of what the norms hand
        on, for which the first batch is run twice more, once by batch and once by running
        statistics. Where that fails, or the model is another since, the page says so.
        """
        return html.write_check(*page_of(self, self._evidence).parts)

    def document(self, verbose: bool = False, *, command_line: bool = False) -> Document:
        """Return the report as a document: three findings open, or with `verbose` all of them.

        Args:
            verbose: Whether to open every finding, and to name all that was not checked.
            command_line: Whether the reader would repair with options instead of with calls.
        """
        return lay_out(self, verbose, COMMAND_LINE if command_line else PYTHON)

    def __str__(self) -> str:
        return self.to_text()

    def _repr_html_(self) -> str:
        return notebook.write(self.document())
