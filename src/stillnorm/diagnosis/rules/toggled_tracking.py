"""SN008: tracking switched off on a layer that has statistics."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count


class ToggledTracking(Rule):
    """The flag that tracks statistics was switched off after construction: eval uses stale ones.

    What it finds:
        A batch norm whose `track_running_stats` is False although it has running statistics, and
        that normalises by the batch in train mode.

    Why it matters:
        The flag was meant for the constructor, where False leaves the statistics out. Set on a
        living layer it stops the updates, and eval mode goes on using what is there: statistics of
        the moment when the flag was set, further from the weights with every step. Measured on
        torch 2.13; until 1.5 the layer went on updating as well.

    When it is fine:
        For a moment, around an auxiliary forward (`sn.no_updates` does that and cannot be
        forgotten). Not reported: layers made with the flag off, which have no statistics; layers
        that are held, which use them in both modes; instance norms.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> net[1].track_running_stats = False
        >>> check(net).findings[0].slug
        'toggled-tracking'

    Fix:
        Unsafe: the flag goes on again, and the statistics are estimated from the batches given
        (`sn.track_statistics`). Where statistics that stand still were the aim:
        `sn.freeze`.

    References:
        pytorch/pytorch#37823, #44415, #20967 and the change of 1.6, #38084.
    """

    code = "SN008"
    slug = "toggled-tracking"
    severity = "warning"
    needs = ("tree",)
    explains = ("SN101", "SN105", "SN115")

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        layers = [layer for layer in evidence.layers if _is_toggled(evidence, layer)]
        if not layers:
            return
        stale = sum(evidence.mismatched(layer) for layer in layers) if evidence.runs else None
        paths = tuple(layer.path for layer in layers if evidence.can_estimate(layer))
        yield self.finding(
            tuple(layer.path for layer in layers),
            "track_running_stats was switched off: train mode normalises by the batch, and eval by "
            "statistics that no longer move",
            evidence={"layers": len(layers), "mismatched": stale},
            note="" if stale is None else _what_data_say(stale, len(layers)),
            help="sn.track_statistics(model, batches); for statistics that stand still, sn.freeze",
            fix=Fix("track and estimate the statistics", "unsafe", "track", paths)
            if paths
            else None,
            where=evidence.where(*layers),
        )


def _is_toggled(evidence: Evidence, layer: NormLayer) -> bool:
    return (
        layer.has_statistics
        and getattr(layer.module, "track_running_stats", True) is False
        and evidence.trains_by_batch(layer)
    )


def _what_data_say(stale: int, layers: int) -> str:
    if stale == 0:
        return "the statistics describe these batches: nothing is lost yet"
    return f"the statistics of {stale} of {count(layers, 'layer')} no longer describe these batches"
