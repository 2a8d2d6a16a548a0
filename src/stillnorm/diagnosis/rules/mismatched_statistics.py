"""SN105: running statistics that do not describe the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.measure import ENOUGH_SAMPLES, Distance
from stillnorm.diagnosis.measures.residue import is_confirmed, residue
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count, short

SHOWN = 3

Seen = tuple[NormLayer, Distance]


class MismatchedStatistics(Rule):
    """A layer's running statistics are far from those of its own input.

    What it finds:
        Layers whose running mean is more than 0.3 deviations, or whose running variance is more
        than a factor of about 1.9, from what the batches given show, root mean square over
        channels, beyond what the sampling of the data explains. The first one in order of the
        forward comes first; what recalibration would leave is measured.

        The unit is the sample: positions of one image are not independent. The size is estimated
        without bias (a healthy layer has 0, not one over the root of n) and must also pass a
        sign-flip test (`effect.py`). The *batch flow* decides: running statistics are averages of
        batch statistics, and since every layer upstream normalises afresh there, an error does not
        spread. The *eval flow* has to show half as much, or with single samples all of it: very
        small batches distort the batch flow, which is no fault of the statistics. With `score`,
        where recalibration raises it by five points (or percent), a third of these thresholds is
        enough: many small errors add up.

        Measured on six architectures with four seeds each, 64 images to calibrate and 64 to check:
        of 24 healthy models the rule accuses none in batches of 16 and 2, on even images and on
        heavy-tailed ones, and one at 32 images in batches of 1; the eval flow alone accuses 6 on
        heavy-tailed ones, the batch flow alone 4 in batches of 1. Of 24 models with one layer's
        mean off by 0.4 deviations, or its variance by a factor of 2, the rule finds 24 from 32
        images on and accuses no other layer; the eval flow alone misses up to half of the doubled
        variances, and accuses 5.7 other layers per model with a halved one.

        Where too few updates are the cause, SN115 names it in place of this rule; see there.

    Why it matters:
        This is the usual form of "train mode is fine, eval is not": statistics that are stale, of
        other preprocessing, of another domain, from before pruning, or from too few updates.

    When it is fine:
        Few samples, or a sample of one kind only (one class, one scene), show a difference that is
        real and yet not the model's fault: below 32 samples it is a remark, and so it is where the
        user's score suffers from nothing (measured: batches of one class each, where eval and
        recalibrated score 100 % and batch statistics 11 %). Held layers, and other
        libraries' frozen ones, drift from the data by design while the weights are fine-tuned:
        train and eval agree there, so it is a remark too, without a fix. Measured: recalibrating
        such networks took one from 91.3 to 82.9 % and another from 95.6 to 97.6 %.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> net[0].num_batches_tracked.fill_(100), net[0].running_mean.fill_(0.1)
        (tensor(100), tensor([0.1000, ...]))
        >>> batches = [255 * torch.rand(64, 8)]  # trained on 0..1, given 0..255
        >>> check(net, batches).findings[0].slug
        'mismatched-statistics'

    Fix:
        Unsafe: `sn.recalibrate` on the batches given. When the cause is the input (0..255 for 0..1,
        another normalisation), mend the input instead.

    References:
        Wu & Johnson, "Rethinking 'Batch' in BatchNorm", arXiv 2105.07576; pytorch/pytorch#5406 and
        #4741. Thresholds: benchmarks/mismatch_thresholds.py.
    """

    code = "SN105"
    slug = "mismatched-statistics"
    severity = "error"
    needs = ("forward",)
    explains = ("SN104",)  # a variance that collapsed beside data that vary

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding for layers that are free, one for layers that are frozen."""
        off = [layer for layer in evidence.in_order(evidence.layers) if evidence.mismatched(layer)]
        far = [
            (layer, seen)
            for layer in self.unexplained(evidence, off)
            if (seen := evidence.distance(layer, "batch"))
        ]
        free = [(layer, seen) for layer, seen in far if not evidence.is_held(layer)]
        held = [(layer, seen) for layer, seen in far if evidence.is_held(layer)]
        if free:
            yield self._free(evidence, free)
        if held:
            yield self.finding(
                tuple(layer.path for layer, _ in held),
                f"the statistics of {count(len(held), 'frozen layer')} describe other data",
                severity="info",
                evidence=_numbers(evidence, held),
                note="train and eval agree, so nothing is wrong",
                table=_table(evidence, held),
                where=evidence.where(held[0][0]),
            )

    def _free(self, evidence: Evidence, layers: Sequence[Seen]) -> Finding:
        paths = tuple(layer.path for layer, _ in layers)
        samples = layers[0][1].samples
        if samples < ENOUGH_SAMPLES:
            note = f"{samples} samples; from {ENOUGH_SAMPLES} on this is an error"
        elif evidence.is_harmless:
            note = "your score hardly suffers: batch statistics and recalibrating bring less than "
            note += "other samples might"
        else:
            note = _cause(evidence, layers)
        whose = "running statistics"
        if len(paths) > 1:
            whose += f" of {len(paths)} layers, {paths[0]} first,"
        return self.finding(
            paths,
            f"{whose} are not those of the data",
            severity="info" if samples < ENOUGH_SAMPLES or evidence.is_harmless else "error",
            evidence=_numbers(evidence, layers),
            note=note,
            also=count(len(paths) - SHOWN, "more layer") if len(paths) > SHOWN else "",
            table=_table(evidence, layers),
            help="sn.recalibrate(model, batches) on training data; where the model's first layer "
            "is among them, look at the input's scale and normalisation before that",
            fix=self.estimation(evidence, (layer for layer, _ in layers)),
            where=evidence.where(layers[0][0]),
        )


def _numbers(evidence: Evidence, layers: Sequence[Seen]) -> dict[str, object]:
    return {
        "samples": layers[0][1].samples,
        "layers": {
            layer.path: {
                "mean": seen.mean,
                "variance_ratio": seen.ratio,
                "p": min(seen.p_mean, seen.p_variance),
                "mean_recalibrated": _repaired(evidence, layer),
            }
            for layer, seen in layers
        },
    }


def _cause(evidence: Evidence, layers: Sequence[Seen]) -> str:
    """Name too few updates where they are the cause and SN115, which says it, does not run."""
    for layer, _ in layers:
        left = residue(evidence, layer)
        if left is not None and is_confirmed(evidence, layer, left):
            return str(left)
    return ""


def _repaired(evidence: Evidence, layer: NormLayer) -> float | None:
    """Return what recalibration would leave of the distance of the means."""
    after = evidence.distance(layer, "recalibrated")
    return None if after is None else after.mean


def _table(evidence: Evidence, layers: Sequence[Seen]) -> Table:
    rows = []
    for layer, seen in layers[:SHOWN]:
        repaired = _repaired(evidence, layer)
        left = "-" if repaired is None else f"{repaired:.2f} sigma"
        name = layer.path or "(root)"
        rows.append((name, f"{seen.mean:.2f} sigma", f"x {short(seen.ratio)}", left))
    return Table(("", "mean off by", "variance", "recalibrated"), tuple(rows), "lrrr", gap=3)
