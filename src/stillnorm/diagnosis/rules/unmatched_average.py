"""SN602: averaged weights beside statistics that are not theirs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.measure import ENOUGH_SAMPLES, Distance
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count, short

SHOWN = 3

_CLASS = re.compile(r"Ema(?![a-z])|EMA|Averag|SWA|Polyak")
_INSIDE = {"module", "ema", "ema_model", "averaged_model", "shadow"}  # of a class of such a name
_CHILD = {"ema", "ema_model", "model_ema", "ema_net", "averaged_model", "swa_model"}  # of any


class UnmatchedAverage(Rule):
    """Weights that are an average (SWA, EMA) beside statistics of other weights.

    What it finds:
        An averaged model whose statistics the batches contradict as SN105 means it. Recognised are
        torch's `AveragedModel` once it has averaged; what a class with such a name (ModelEma,
        ExponentialMovingAverage) keeps as its `module`, `ema_model` or the like; and a child called
        `ema`, `ema_model`, `swa_model` or the like beside one with the same layers. Only what the
        forward calls can be judged: give `check` the averaged model, or a `forward` that uses it.

        Soups and federated averages are ordinary models: nothing in the tree tells, and SN105
        reports them.

    Why it matters:
        Loops over `parameters()` never touch the statistics, `AveragedModel` copies those of the
        last model, and an average of statistics is not that of the averaged weights. Measured: live
        98.5 %, averaged with the default 95.0 %, with parameters only 43.4 %, and 98.9 % with its
        own statistics.

    When it is fine:
        While the average is close to the live weights, a short memory or a low learning rate, the
        live statistics fit as well: not reported as long as the data do not contradict them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.optim.swa_utils import AveragedModel
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
        >>> x, average = torch.randn(128, 8), AveragedModel(net)
        >>> for _ in range(4):
        ...     _ = nn.init.normal_(net[0].weight)          # a long way, as training goes
        ...     for _ in range(50):
        ...         _ = net(x)
        ...     average.update_parameters(net)
        >>> check(average, x, select="unmatched-average").findings[0].paths
        ('1',)

    Fix:
        Unsafe: `sn.recalibrate` on the batches given; `sn.match_average` is the same, with a look
        at whether the model is an average.

    References:
        Izmailov et al., "Averaging Weights Leads to Wider Optima", arXiv 1803.05407, section 3.2;
        CuriousAI/mean-teacher#9; pytorch/ignite#2590; huggingface/pytorch-image-models#245.
    """

    code = "SN602"
    slug = "unmatched-average"
    severity = "error"
    needs = ("tree", "forward")
    preview = True
    explains = ("SN101", "SN105")

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding for each averaged model."""
        for average in _averages(evidence.model):
            inside = set(average.module.modules())
            layers = [
                layer
                for layer in evidence.in_order(evidence.layers)
                if layer.module in inside and not evidence.is_held(layer)
            ]
            off = [
                (layer, seen)
                for layer in layers
                if evidence.mismatched(layer) and (seen := evidence.distance(layer, "batch"))
            ]
            if off:
                yield self._found(evidence, average, off, len(layers))

    def _found(
        self,
        evidence: Evidence,
        average: _Average,
        off: list[tuple[NormLayer, Distance]],
        layers: int,
    ) -> Finding:
        samples = off[0][1].samples
        rows = [
            (layer.path, f"{seen.mean:.2f} sigma", f"x {short(seen.ratio)}") for layer, seen in off
        ]
        return self.finding(
            tuple(layer.path for layer, _ in off),
            f"{average.words}: {len(off)} of {count(layers, 'layer')} contradict the data",
            severity=None if samples >= ENOUGH_SAMPLES else "info",
            evidence={
                "samples": samples,
                "averaged": average.averaged,
                "layers": {x.path: {"mean": s.mean, "variance_ratio": s.ratio} for x, s in off},
            },
            note=_whose([layer for layer, _ in off], average.twin),
            table=Table(("", "mean off by", "variance"), tuple(rows[:SHOWN]), "lrr", gap=3),
            help="sn.match_average(average, batches) on training data, after the last update",
            fix=self.estimation(evidence, (layer for layer, _ in off)),
            where=evidence.where(off[0][0]),
        )


@dataclass(frozen=True)
class _Average:
    """A module with averaged weights.

    Args:
        module: The module.
        words: What it is and whose statistics it has.
        averaged: How many models it averages, where it says.
        twin: The module with the live weights, if it is there.
    """

    module: nn.Module
    words: str
    averaged: int | None = None
    twin: nn.Module | None = None


def _averages(model: nn.Module) -> Iterator[_Average]:
    """Find the outermost modules with averaged weights."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        if module in inside:
            continue
        for average in _in(module):
            inside |= set(average.module.modules())
            yield average


def _in(module: nn.Module) -> Iterator[_Average]:
    """Yield what is an average in this module, itself or a child of it."""
    if isinstance(module, AveragedModel):
        averaged = int(module.n_averaged)
        if averaged:
            whose = "averages, too" if module.use_buffers else "the last one's"
            words = f"the weights average {count(averaged, 'model')}, the statistics are {whose}"
            yield _Average(module, words, averaged)
        return
    named = bool(_CLASS.search(type(module).__name__))
    for name, child in module.named_children():
        twin = _twin(module, child)
        if (named and name in _INSIDE) or (name in _CHILD and twin is not None):
            yield _Average(child, "the weights are averages, the statistics not theirs", None, twin)


def _twin(parent: nn.Module, child: nn.Module) -> nn.Module | None:
    """Return another child with tensors of the same names and shapes."""
    shapes = _shapes(child)
    others = (other for other in parent.children() if other is not child)
    return next((other for other in others if shapes and _shapes(other) == shapes), None)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _whose(layers: list[NormLayer], twin: nn.Module | None) -> str:
    """Say whose statistics these are, where that can be seen."""
    if all(layer.never_estimated for layer in layers):
        return "the statistics were never estimated: mean 0, variance 1"
    means = [layer.running_mean for layer in layers]
    theirs = [] if twin is None else list(twin.buffers())
    copied = all(
        any(mean is not None and mean.shape == t.shape and torch.equal(mean, t) for t in theirs)
        for mean in means
    )
    return "they are those of the live weights" if copied else ""
