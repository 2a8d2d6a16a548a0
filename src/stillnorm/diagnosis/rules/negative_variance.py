"""SN103: a variance below zero."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.stored import values
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count, short

SHOWN = 3


class NegativeVariance(Rule):
    """A running variance is below zero, which no data can make it.

    What it finds:
        A negative value in `running_var`.

    Why it matters:
        Below -eps the root is NaN, and so is every eval output from there on; between -eps and 0
        the gain is beyond the largest that eps allows, without end (measured at -1e-9, eps 1e-5:
        316.2). Train mode does not read the buffer. It comes from arithmetic on state dicts (task
        vectors, extrapolated averages), from conversions, and from variances computed as
        E[x^2] - E[x]^2 elsewhere.

    When it is fine:
        Never. -0.0 is zero, and not reported.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> net[1].running_var[3] = -0.1
        >>> check(net).findings[0].evidence["channels"]
        {'1': 1}

    Fix:
        Unsafe: `sn.recalibrate` on the batches given, which does not use the old values. Without
        data `sn.repair.clamp_variance` makes the output finite, not right.

    References:
        pytorch/pytorch#90342 (a forum's "NaN, negative running_var"); timgaripov/swa#8;
        tenstorrent/tt-metal#45968.
    """

    code = "SN103"
    slug = "negative-variance"
    severity = "error"
    needs = ("state",)
    explains = ("SN104", "SN105", "SN111")

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding; the layer with the most negative variance stands first."""
        lowest = {
            layer: seen
            for layer in evidence.layers
            if (seen := _negative(evidence, layer)) is not None
        }
        layers = sorted(self.unexplained(evidence, lowest), key=lambda layer: lowest[layer][1])
        if not layers:
            return
        nan = [layer for layer in layers if lowest[layer][1] <= -layer.eps]
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"running variance below zero, {short(lowest[layers[0]][1])} at the least: eval "
            + ("outputs are NaN" if nan else "outputs are out of all proportion")
            + ", train mode does not show it",
            evidence={
                "channels": {layer.path: lowest[layer][0] for layer in layers},
                "least": {layer.path: lowest[layer][1] for layer in layers},
            },
            also=count(len(layers) - SHOWN, "more layer") if len(layers) > SHOWN else "",
            table=Table(
                ("", "channels", "least"),
                tuple(
                    (x.path or "(root)", f"{lowest[x][0]} of {x.num_features}", short(lowest[x][1]))
                    for x in layers[:SHOWN]
                ),
                "lrr",
            ),
            help="sn.recalibrate(model, batches); then look for what computes with the statistics "
            "(task arithmetic, extrapolation, a conversion)",
            fix=self.estimation(evidence, layers),
            where=evidence.where(*layers),
        )


def _negative(evidence: Evidence, layer: NormLayer) -> tuple[int, float] | None:
    """Return how many channels are below zero, and the least of them."""
    var = values(evidence.statistics[layer.path][1])
    below = None if var is None else var[var < 0]
    return None if below is None or not below.numel() else (below.numel(), float(below.min()))
