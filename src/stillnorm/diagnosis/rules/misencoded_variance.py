"""SN110: a running variance that holds something else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.measures.encoding import Encoding, Reading, read_encodings
from stillnorm.diagnosis.measures.measure import distance
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.repair.statistics import Held, variance_of
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import short

SHOWN = 3
SAME = math.log(1.25)  # two layers' factors are one: each is known to about a tenth

Readings = dict[NormLayer, Reading]

_WORDS: dict[Held, str] = {
    "deviation": "a standard deviation",
    "inverse deviation": "an inverse standard deviation",
    "inverse": "an inverse variance",
}


class MisencodedVariance(Rule):
    """The running variance is a standard deviation, an inverse, or off by one factor.

    What it finds:
        Layers whose running variance, channel by channel, is a known function of the variance that
        the batches show: the deviation, its inverse, the inverse variance, or the variance times
        one factor. Against the variances measured it lies on a line of slope 0.5, -0.5, -1 or 1 in
        logarithms (`encoding.py`); after conversion less is left than half of what SN105 calls far,
        and the running mean is right. It is told for each layer by itself; once one is, layers
        whose variances differ too little for a slope are named too, where their values agree, and
        those that are too narrow or too noisy, where conversion leaves nothing that SN105 would
        name.

        A factor is told for several layers together: at least two, and half of those that can be
        measured, with the same factor. Their means have to be as they are, or multiplied as well,
        as in Caffe's files, where both are to be divided by a third number. Means that are off by
        the root of the factor are those of an input of another scale, not of an encoding.

        At least 8 channels and 32 samples, and for a slope variances that differ three times as
        much as their sampling errors; otherwise SN105 speaks. Measured by
        benchmarks/data_rules.py on 80 networks: none named as they are, none on data of another
        domain, none with statistics moved at random.

    Why it matters:
        The file loads without complaint, every shape is right, and training by batch statistics
        does not read the value: only eval is wrong. Recalibration repairs it where there are data;
        the conversion is exact and needs none.

    When it is fine:
        Never. Not reported: layers that are held and other libraries' frozen ones. What comes after
        a wrong one of them receives other than it was made for, and cannot be judged.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check, recalibrate
        >>> x = torch.logspace(-2, 2, 16) * torch.randn(256, 16)
        >>> net = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 2))
        >>> _ = recalibrate(net, [x])
        >>> _ = net[0].running_var.sqrt_()      # what a converter wrote
        >>> check(net, x).findings[0].message
        'the running variance is a standard deviation'

    Fix:
        Unsafe: computes the variance of what is held, in place. None where a factor is on the mean
        as well: `help` has the number to divide both by.

    References:
        apache/mxnet#9624; pytorch/pytorch#10008 (statistics written by hand); Caffe's BatchNorm
        layer, whose third blob divides the other two.
    """

    code = "SN110"
    slug = "misencoded-variance"
    severity = "error"
    needs = ("forward",)
    explains = ("SN105",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding for each encoding."""
        free = [
            layer
            for layer in evidence.in_order(evidence.layers)
            if layer.family == "batch" and not evidence.is_held(layer)
        ]
        readings = {layer: found for layer in free if (found := _read(evidence, layer))}
        told = {encoding: _all_of(encoding, readings) for encoding in _WORDS}
        for encoding, of_it in told.items():
            if of_it:
                others = set().union(*told.values()) - of_it.keys()
                layers = _with(evidence, of_it, (x for x in free if x not in others), encoding)
                yield self._found(evidence, of_it, f"is {_WORDS[encoding]}", encoding, layers)
        measured = sum(evidence.distance(layer, "batch") is not None for layer in free)
        if scaled := _of_one_factor(_all_of("factor", readings), measured):
            others = set().union(*told.values())
            yield self._scaled(evidence, scaled, [x for x in free if x not in others])

    def _scaled(self, evidence: Evidence, readings: Readings, free: Sequence[NormLayer]) -> Finding:
        factor = median(r.factor for r in readings.values())
        held = float(f"{1 / factor:.3g}")
        words = f"is {short(factor, 3)} times that of the data"
        if _means_too(readings):
            layers = _with(evidence, readings, free, held, of_mean=held)
            words += ", and so is the mean"
            help = f"divide running_mean and running_var by {short(factor, 3)}"
            return self._found(evidence, readings, words, None, layers, help)
        return self._found(evidence, readings, words, held, _with(evidence, readings, free, held))

    def _found(
        self,
        evidence: Evidence,
        readings: Readings,
        words: str,
        held: str | float | None,
        layers: Sequence[NormLayer],
        help: str = "mend the loading, or sn.repair.convert_variance(model, {!r}, layers)",
    ) -> Finding:
        paths = tuple(layer.path for layer in layers)
        whose = "" if len(paths) == 1 else f" of {len(paths)} layers"
        fix = (
            None if held is None else Fix("make a variance of it", "unsafe", "convert", paths, held)
        )
        return self.finding(
            paths,
            f"the running variance{whose} {words}",
            evidence={
                "layers": {
                    layer.path: {"slope": r.slope, "factor": r.factor, "left": r.after}
                    for layer, r in readings.items()
                }
            },
            table=_table(readings),
            help=help.format(held),
            fix=fix,
            where=evidence.where(*layers),
        )


def _read(evidence: Evidence, layer: NormLayer) -> list[Reading]:
    """Tell what a layer that SN105 would name can hold in place of its variance."""
    mean, var, seen = layer.running_mean, layer.running_var, evidence.samples(layer, "batch")
    off = evidence.distance(layer, "batch")
    if mean is None or var is None or seen is None or off is None or not off.is_far():
        return []
    return read_encodings(mean, var, seen, layer.eps)


def _all_of(encoding: Encoding | Held, readings: Mapping[NormLayer, Sequence[Reading]]) -> Readings:
    """Return the layers that hold it: told by the slope or, once one is, by the fit alone."""
    own = {layer: found[0] for layer, found in readings.items() if found[0].told}
    if not any(reading.encoding == encoding for reading in own.values()):
        return {}
    told = {reading.encoding for reading in own.values()}
    best = own | {
        layer: next((r for r in found if r.encoding in told), found[0])
        for layer, found in readings.items()
        if layer not in own
    }
    return {layer: best[layer] for layer in readings if best[layer].encoding == encoding}


def _of_one_factor(scaled: Readings, measured: int) -> Readings:
    """Return the layers whose variances share a factor, where it is one of the file's."""
    if not scaled:
        return {}
    common = math.log(median(r.factor for r in scaled.values()))
    alike = {layer: r for layer, r in scaled.items() if abs(math.log(r.factor) - common) < SAME}
    if len(alike) < 2 or 2 * len(alike) < measured:
        return {}
    powers = {r.mean_power for r in alike.values()}
    return alike if powers & {0.0, 1.0} and 0.5 not in powers else {}


def _with(
    evidence: Evidence,
    told: Readings,
    free: Iterable[NormLayer],
    held: Held | float,
    of_mean: float = 1.0,
) -> list[NormLayer]:
    """Return the layers told, and those too narrow or too noisy to tell that it explains whole."""

    def is_all(layer: NormLayer) -> bool:
        mean, var = evidence.statistics[layer.path]
        seen, off = evidence.samples(layer, "batch"), evidence.distance(layer, "batch")
        if mean is None or var is None or off is None or not off.is_far():
            return False
        var = variance_of(var.double(), held, layer.eps)
        left = distance(mean * of_mean, var, layer.eps, seen, instance=False)
        return left is not None and not left.is_far()

    return [layer for layer in free if layer in told or is_all(layer)]


def _means_too(readings: Readings) -> bool:
    """Tell whether the means are multiplied by the factor, as Caffe's are."""
    powers = [r.mean_power for r in readings.values()]
    return powers.count(1.0) > powers.count(0.0)


def _table(readings: Readings) -> Table:
    rows = [
        (
            layer.path or "(root)",
            f"{r.slope:.2f}",
            f"x {short(math.exp(r.before))}",
            f"x {math.exp(r.after):.2f}",
        )
        for layer, r in readings.items()
    ]
    return Table(("", "log-log slope", "off by", "converted"), tuple(rows[:SHOWN]), "lrrr", gap=3)
