"""SN112: statistics that nobody ever wrote."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.stored import updates, values
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count

MOST_UPDATES = 10**9  # four months at a hundred a second
LARGEST_MEAN = 2.0**64  # its square is beyond float32, so no finite variance goes with it
SHOWN = 3


class UnmaterializedStatistics(Rule):
    """The statistics have no values: they are on the meta device, or memory as it was found.

    What it finds:
        Statistics on the meta device in a model that has real tensors. And what tells uninitialised
        memory from statistics: more than a billion updates counted, or fewer than none; a running
        mean beyond 1.8e19; a variance of 0 in every channel before the first update, where a new
        layer has 1.

    Why it matters:
        Models built on the meta device get memory from `to_empty`, and what a checkpoint of
        parameters does not bring stays as that memory was. Measured on torch 2.13: of eight such
        layers seven had means of 1e25, or counted 140 trillion updates; the eighth had a variance
        of -1e27. Train mode does not read it, and hands it on to the next checkpoint.

    When it is fine:
        A model wholly on the meta device, which is a skeleton, and layers that accelerate offloads:
        neither is reported. Nor is a counter alone, where the batches bear the statistics out, as
        after `sn.recalibrate`, which goes on counting. Memory that happens to look like statistics
        cannot be told from them without batches.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> net[1].running_mean = net[1].running_mean.to("meta")
        >>> check(net).findings[0].evidence["layers"]
        {'1': 'on the meta device'}

    Fix:
        Unsafe: `sn.recalibrate` on the batches given, where the layer has memory. On the meta
        device: `load_state_dict(..., assign=True)` from a checkpoint with buffers, or `to_empty`
        and `reset_running_stats` before `sn.recalibrate`.

    References:
        pytorch/pytorch#8430; huggingface/transformers#43520; TengdaHan/DPC#10.
    """

    code = "SN112"
    slug = "unmaterialized-statistics"
    severity = "error"
    needs = ("state",)
    explains = ("SN101", "SN102", "SN103", "SN104", "SN105", "SN111")

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer, with what gives it away."""
        real = any(
            not tensor.is_meta
            for tensor in (*evidence.model.parameters(), *evidence.model.buffers())
        )
        signs = {layer: sign for layer in evidence.layers if (sign := _sign(evidence, layer, real))}
        if not signs:
            return
        yield self.finding(
            tuple(layer.path for layer in signs),
            f"the statistics of {count(len(signs), 'layer')} were never written: they are what "
            "memory held, or nothing",
            evidence={"layers": {layer.path: sign for layer, sign in signs.items()}},
            also=count(len(signs) - SHOWN, "more layer") if len(signs) > SHOWN else "",
            table=Table(
                ("", "sign"),
                tuple((x.path or "(root)", sign) for x, sign in list(signs.items())[:SHOWN]),
                "ll",
            ),
            help="load a checkpoint that has the buffers, or sn.repair.reset_statistics "
            "and sn.recalibrate(model, batches)",
            fix=self.estimation(evidence, signs),
            where=evidence.where(*signs),
        )


def _sign(evidence: Evidence, layer: NormLayer, real: bool) -> str:
    """Say what shows that the layer's statistics were never written; nothing where nothing does."""
    if layer.is_lazy:
        return ""
    tensors = layer.running_mean, layer.running_var
    if any(t is not None and t.is_meta for t in tensors):
        offloaded = hasattr(layer.module, "_hf_hook")
        return "on the meta device" if real and not offloaded else ""
    counted = updates(layer)
    if not 0 <= counted <= MOST_UPDATES and not _is_described(evidence, layer):
        return f"{counted} updates counted"
    mean, var = map(values, evidence.statistics[layer.path])
    return _impossible(mean, var, counted)


def _is_described(evidence: Evidence, layer: NormLayer) -> bool:
    """Tell whether the batches bear the statistics out: then only the counter is left as found."""
    return evidence.distance(layer, "batch") is not None and not evidence.mismatched(layer)


def _impossible(mean: Tensor | None, var: Tensor | None, counted: int) -> str:
    if mean is None or var is None or not var.numel():
        return ""
    largest = float(mean[mean.isfinite()].abs().max()) if mean.isfinite().any() else 0.0
    if largest > LARGEST_MEAN:
        return f"a running mean of {largest:.0e}"
    if counted == 0 and not mean.any() and not var.any():
        return "variance 0 in every channel before the first update"
    return ""
