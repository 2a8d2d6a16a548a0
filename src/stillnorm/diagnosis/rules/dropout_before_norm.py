"""SN205: statistics taken with dropout on, used with dropout off."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.evidence.structure import Shift
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.errors import StillnormError
from stillnorm.norms import walk
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count

SHIFTED = 1.25  # measured by benchmarks/dropout_shift.py; see below
SHOWN = 3


class DropoutBeforeNorm(Rule):
    """A dropout before a norm makes the variance in train mode another than in eval mode.

    What it finds:
        A norm that normalises by the batch in train mode, with a dropout between it and the norm
        before it, and whose input varies at least 1.25 times as much with dropout on as with it
        off. Measured on the first batch.

    Why it matters:
        Dropout keeps the mean and raises the variance. The running variance is that of training,
        so that eval mode divides by too much, and each such norm adds to it. Measured on a network
        of four layers: at shifts of 1.27 to 1.29 the error of a regression is 58 to 75 % larger
        than with statistics estimated without dropout, at 1.11 and 1.12 20 to 47 %; digits lost
        nothing up to 1.28. On CIFAR-100 a dropout of 0.5 in every block costs ResNet-110 several
        points.

    When it is fine:
        Wide layers, whose inputs move together, hardly feel it, nor do small probabilities: both
        are measured. Not reported: dropout after the last norm; with another norm between; before
        frozen norms.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.BatchNorm1d(8))
        >>> check(net, torch.randn(64, 8), select="SN205").findings[0].evidence["ratio"]["2"] > 1.5
        True

    Fix:
        Advice: move the dropout behind the last norm, lower its probability, or estimate the
        statistics without it once training is over, `sn.recalibrate(model, batches)`.

    References:
        Li et al., "Understanding the Disharmony between Dropout and Batch Normalization by Variance
        Shift", arXiv 1801.05134. Threshold: benchmarks/dropout_shift.py.
    """

    code = "SN205"
    slug = "dropout-before-norm"
    severity = "warning"
    needs = ("forward",)
    explains = ("SN105",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding; the layer with the largest shift stands first."""
        try:
            shifts = evidence.structure.shifts
        except StillnormError as error:
            raise CannotTell(f"with dropout on: {error.fact}") from error
        trains = {layer.path: layer for layer in evidence.layers if evidence.trains_by_batch(layer)}
        far = [shift for shift in shifts if shift.path in trains and shift.ratio >= SHIFTED]
        if not far:
            return
        far.sort(key=lambda shift: shift.ratio, reverse=True)
        worst = far[0]
        path = worst.path or "the norm"
        yield self.finding(
            tuple(shift.path for shift in far),
            f"with dropout on, the input of {path} varies {worst.ratio:.2f} times as much as in "
            "eval mode",
            evidence={"ratio": {shift.path: shift.ratio for shift in far}},
            note=f"dropout: {_named(evidence, worst)}",
            table=Table(
                ("", "variance with dropout over without"),
                tuple((x.path or "(root)", f"{x.ratio:.2f}") for x in far[:SHOWN]),
                "lr",
            ),
            also=count(len(far) - SHOWN, "more layer") if len(far) > SHOWN else "",
            help="move the dropout behind the last norm, or estimate the statistics without it "
            "after training: sn.recalibrate(model, batches)",
            where=evidence.where(trains[worst.path]),
        )


def _named(evidence: Evidence, shift: Shift) -> str:
    """Name the dropouts by their path, or the module that calls the function, and probability."""
    paths: dict[nn.Module | None, str] = {m: path for path, m, _ in walk(evidence.model)}
    names = (
        f"{paths.get(dropout.module, '') or dropout.site or 'the model'} (p={dropout.p:g})"
        for dropout in shift.dropouts
    )
    return ", ".join(sorted(set(names)))
