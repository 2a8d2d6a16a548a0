"""SN201: one layer, several inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix, source_lines
from stillnorm.diagnosis.fixing.acceptance import accepted
from stillnorm.diagnosis.measures.measure import Distance, Samples, between, samples_of
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.repair import split_shared
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count, number


class SharedLayer(Rule):
    """One norm layer is called at several places that feed it differently.

    What it finds:
        A layer that normalises by the batch in train mode and is called more than once in a
        forward, on inputs whose means or variances differ by more than SN105's thresholds, sample
        by sample and beyond noise. Each call's source line is named.

    Why it matters:
        In train mode every call is normalised by its own batch, so training goes well. The running
        statistics are one mixture of all inputs and fit none: eval is near chance. Recalibration
        does not help, since there is only one set of statistics to estimate. Measured on the
        network of the thread below: train mode 98.4 %, eval 21.4 %, recalibrated 26.4 %, one norm
        per call (the same weights) 98.4 %.

    When it is fine:
        When all calls see the same distribution: a Siamese network, crops of one image, repeated
        forwards of one batch. Not reported: those, and layers that are frozen, since they use the
        same statistics in both modes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bn = nn.BatchNorm1d(8)
        ...     def forward(self, x):
        ...         return self.bn(5 + 3 * self.bn(x).relu())
        >>> check(Net(), torch.randn(64, 8)).findings[0].slug
        'shared-layer'

    Fix:
        `sn.split_shared(model, batches)` gives each call statistics of its own without a change to
        the code (unsafe: new keys in the `state_dict`, statistics from the batches). Or write one
        norm per call, in an `nn.ModuleList` where there are many.

    References:
        The PyTorch forum, "What does model.eval() do for batchnorm layer?" (76 % against 10 %);
        pytorch/pytorch#1738; junyanz/pytorch-CycleGAN-and-pix2pix#1005.
    """

    code = "SN201"
    slug = "shared-layer"
    severity = "error"
    needs = ("forward",)
    explains = ("SN105",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding; the layer whose inputs differ most stands first."""
        shared = [
            seen
            for layer in evidence.in_order(evidence.layers)
            if evidence.trains_by_batch(layer) and (seen := _sites(evidence, layer)) is not None
        ]
        shared.sort(key=lambda seen: seen.worst.mean + seen.worst.variance, reverse=True)
        if not shared:
            return
        first, *others = shared
        name = first.layer.path or "the model"
        yield self.finding(
            tuple(seen.layer.path for seen in shared),
            f"{name} normalises {_words(len(first.sites))} different inputs with one set of "
            "statistics",
            evidence={"calls": {seen.layer.path: len(seen.sites) for seen in shared}},
            also=", ".join(_also(evidence, seen) for seen in others),
            table=_table(first),
            help="sn.split_shared(model, batches), or write one norm per call; recalibration alone "
            "cannot repair it: there is only one set of statistics to estimate",
            fix=_fix(evidence, [seen.layer for seen in shared]),
            where=evidence.where(first.layer),
        )


@dataclass(frozen=True, eq=False)
class _Shared:
    layer: NormLayer
    sites: tuple[Samples, ...]
    worst: Distance


def _sites(evidence: Evidence, layer: NormLayer) -> _Shared | None:
    """Return the layer's call sites when two of them differ."""
    runs = evidence.measured
    grouped = runs.traces["batch"].sites(layer.path)
    if len(grouped) < 2:
        return None
    sites = [seen for calls in grouped if (seen := samples_of(calls, runs.batch_sizes))]
    pairs = [between(a, b, layer.eps) for a, b in combinations(sites, 2)]
    far = [pair for pair in pairs if pair is not None and pair.is_far()]
    if not far:
        return None
    return _Shared(layer, tuple(sites), max(far, key=lambda pair: pair.mean + pair.variance))


def _fix(evidence: Evidence, layers: list[NormLayer]) -> Fix | None:
    """Return the split of the layers that can be split; it is tried, which runs the batches."""
    model, runs = evidence.model, evidence.measured
    modules = [layer.module for layer in layers]
    paths = accepted(
        model,
        layers,
        lambda: split_shared(model, iter(runs.batches), modules, forward=runs.forward),
    )
    return Fix("give each call a norm of its own", "unsafe", "split", paths) if paths else None


def _words(n: int) -> str:
    return {2: "two", 3: "three", 4: "four"}.get(n, str(n))


def _also(evidence: Evidence, seen: _Shared) -> str:
    calls, lines = count(len(seen.sites), "call"), source_lines(evidence.where(seen.layer))
    return f"{seen.layer.path} ({calls}, {lines})" if lines else f"{seen.layer.path} ({calls})"


def _table(seen: _Shared) -> Table:
    """Lay out each site's mean and variance, averaged over channels, and the running ones."""
    rows = [
        (f"call {i}", number(float(mean.mean())), number(float(var.mean())), "")
        for i, (mean, var) in enumerate((site.pooled for site in seen.sites), start=1)
    ]
    mean, var = seen.layer.running_mean, seen.layer.running_var
    if mean is not None and var is not None:
        both = "neither" if len(seen.sites) == 2 else "none"
        rows.append(
            ("running", number(float(mean.mean())), number(float(var.mean())), f"fits {both}")
        )
    return Table(("", "mean", "variance", ""), tuple(rows), "lrrl", gap=3)
