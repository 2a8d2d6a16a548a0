"""What a rule is: one class, one file, one kind of fault.

A rule looks at the `Evidence` and yields findings. It changes nothing, and it measures nothing that
another rule might want too: what is measured belongs to the evidence. Its docstring is its
documentation, with fixed headings; `stillnorm explain` prints it and a test checks that it is
complete.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import ClassVar

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.request import Need
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Severity, Table

HEADINGS = (
    "What it finds",
    "Why it matters",
    "When it is fine",
    "Example",
    "Fix",
    "References",
)
_HEADING = re.compile(rf"^({'|'.join(HEADINGS)}):\n", re.MULTILINE)


class Rule(ABC):
    """Base of all rules.

    Attributes:
        code: Permanent, ``"SN201"``.
        slug: Permanent; reads as "allow ...": ``"shared-layer"``. The file is named after it.
        severity: How bad it usually is; a finding can differ where its evidence says so.
        needs: What has to be given for the rule to run, all of it: ``"state"``, the tensors of norm
            layers, which a checkpoint has too; ``"tree"``, a model; ``"forward"``, batches;
            ``"score"``, ``"predict"``, ``"step"`` (`train_step`) and ``"optimizer"``, those
            arguments of `check`; ``"checkpoint"``, a file; ``"group"``, several processes.
        preview: Whether it runs only when it is selected by its own name.
        explains: Codes of symptoms that this fault causes on the same layers: they are not
            reported again.
        spreads: Whether those symptoms also show on layers that are called after.
    """

    code: ClassVar[str]
    slug: ClassVar[str]
    severity: ClassVar[Severity]
    needs: ClassVar[tuple[Need, ...]]
    preview: ClassVar[bool] = False
    explains: ClassVar[tuple[str, ...]] = ()
    spreads: ClassVar[bool] = False

    @abstractmethod
    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield what is wrong. Never changes the model."""

    def symptoms(self, finding: Finding) -> tuple[str, ...]:
        """Return the codes that one finding explains, where not all of the rule's explain all."""
        return self.explains

    def unexplained(self, evidence: Evidence, layers: Iterable[NormLayer]) -> list[NormLayer]:
        """Return the layers whose symptom no cause found before accounts for."""
        return [layer for layer in layers if not evidence.causes.explain(self.code, layer.path)]

    def estimation(self, evidence: Evidence, layers: Iterable[NormLayer]) -> Fix | None:
        """Return the fix that estimates the layers' statistics, where the batches allow it."""
        paths = tuple(layer.path for layer in layers if evidence.can_estimate(layer))
        return Fix("estimate the statistics", "unsafe", "recalibrate", paths) if paths else None

    @classmethod
    def sections(cls) -> dict[str, str]:
        """Return the documentation: the summary under ``""``, then each heading's text."""
        summary, *rest = _HEADING.split(inspect.getdoc(cls) or "")
        return {"": summary.strip()} | {
            heading: inspect.cleandoc("\n" + text)
            for heading, text in zip(rest[::2], rest[1::2], strict=True)
        }

    def finding(
        self,
        paths: tuple[str, ...],
        message: str,
        *,
        severity: Severity | None = None,
        evidence: Mapping[str, object] | None = None,
        note: str = "",
        also: str = "",
        help: str = "",
        fix: Fix | None = None,
        where: tuple[str, ...] = (),
        table: Table | None = None,
    ) -> Finding:
        """Make a finding of this rule."""
        return Finding(
            code=self.code,
            slug=self.slug,
            severity=severity or self.severity,
            paths=paths,
            message=message,
            evidence=evidence or {},
            note=note,
            also=also,
            help=help,
            fix=fix,
            where=where,
            table=table,
        )
