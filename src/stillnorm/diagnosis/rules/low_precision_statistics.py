"""SN401: running statistics in half precision."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count, short

SHOWN = 3
_HALF = (torch.float16, torch.bfloat16)


class LowPrecisionStatistics(Rule):
    r"""The running statistics are kept in half precision, where small updates are lost.

    What it finds:
        Statistics in float16 or bfloat16 of a layer that updates them in train mode; and of any
        layer where float16 has lost them already: a variance of 0, of less than the smallest normal
        number, or of infinity.

    Why it matters:
        An update moves a value by momentum times the difference. Below half a unit in the last
        place nothing moves: with unit roundoff u the average stops within u / m of its aim, 4 % in
        bfloat16 at momentum 0.1, 39 % at 0.01. Measured, bfloat16 and momentum 0.01: a mean of 13.4
        for 20, a variance of 6.7 for 9. In float16 variances below 6e-8 become 0, above 65504
        infinity.

    When it is fine:
        A network that only infers: nothing is updated. In eval mode it is therefore a remark, as
        long as no value is lost. Not reported: half-precision inputs to a float32 layer, which is
        how autocast and `sn.repair.to_float32` leave it; held layers without lost values.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).bfloat16()
        >>> check(net).findings[0].slug
        'low-precision-statistics'

    Fix:
        Unsafe: the whole layer to float32, parameters and statistics together; its inputs and
        outputs may stay in half precision. What was lost comes back with `sn.recalibrate`.

    References:
        facebookresearch/fairscale#442; pytorch/pytorch#75478, #76642 and #96203;
        pytorch/vision#2599.
    """

    code = "SN401"
    slug = "low-precision-statistics"
    severity = "warning"
    needs = ("state",)
    explains = ("SN104",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding; layers that have lost values stand first."""
        lost = {layer: _lost(evidence, layer) for layer in evidence.layers if _is_half(layer)}
        layers = [x for x in lost if lost[x] or x.updates_statistics(evidence.in_train(x))]
        layers = sorted(layers, key=lambda layer: -lost[layer])
        if not layers:
            return
        matters = any(lost[layer] or layer.module.training for layer in layers)
        paths = tuple(layer.path for layer in layers)
        yield self.finding(
            paths,
            f"running statistics of {count(len(layers), 'layer')} in {_name(layers[0])}: "
            + _consequence(layers[0], lost[layers[0]]),
            severity="warning" if matters else "info",
            evidence={
                "dtype": {layer.path: _name(layer) for layer in layers},
                "lost_channels": {layer.path: lost[layer] for layer in layers},
            },
            also=count(len(layers) - SHOWN, "more layer") if len(layers) > SHOWN else "",
            table=Table(
                ("", "dtype", "lost"),
                tuple(
                    (x.path or "(root)", _name(x), f"{lost[x]} of {x.num_features}")
                    for x in layers[:SHOWN]
                ),
                "llr",
            ),
            help="keep norm layers in float32: sn.repair.to_float32(model)",
            fix=Fix("the whole layer to float32", "unsafe", "float32", paths),
            where=evidence.where(*layers),
        )


def _is_half(layer: NormLayer) -> bool:
    if layer.is_lazy:
        return False
    return any(t is not None and t.dtype in _HALF for t in (layer.running_mean, layer.running_var))


def _lost(evidence: Evidence, layer: NormLayer) -> int:
    """Return in how many channels the type has lost the variance."""
    var: Tensor | None = evidence.statistics[layer.path][1]
    if var is None or var.is_meta or var.dtype != torch.float16:
        return 0  # bfloat16 has the range of float32
    return int(((var.abs() < torch.finfo(var.dtype).tiny) | var.isinf()).sum())


def _name(layer: NormLayer) -> str:
    return str(_half_type(layer)).removeprefix("torch.")


def _half_type(layer: NormLayer) -> torch.dtype:
    types = [t.dtype for t in (layer.running_mean, layer.running_var) if t is not None]
    return next(dtype for dtype in types if dtype in _HALF)


def _consequence(layer: NormLayer, lost: int) -> str:
    if lost:
        return f"{count(lost, 'variance')} lost"
    if not layer.momentum:
        return "small updates are lost"
    stall = 50 * torch.finfo(_half_type(layer)).eps / layer.momentum  # u is half of eps
    return f"updates stop within {short(stall)} % of their aim"
