"""SN302: forwards that look for something, and update statistics on the way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.diagnosis.training_step.step import StepCall
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count

Forwards = dict[int, list[StepCall]]  # by number: the calls of one layer, or of all

_GRADIENT = {
    "used": "trains",
    "dropped": "dropped before a step",
    "input": "of the input only",
    "none": "none",
}


class ExtraForwardUpdates(Rule):
    """A training step runs forwards that train nothing, and they update statistics too.

    What it finds:
        Layers whose statistics one training step moves in several forwards with gradients, of which
        some train nothing (their gradient is dropped before an optimizer step, is taken of the
        input only, or there is none), or run with weights that are taken back.

    Why it matters:
        Every forward in train mode is an update. The statistics come to describe perturbed weights
        (SAM), adversarial inputs (PGD, VAT) or a mixture, and eval uses them on clean data with the
        real weights; and momentum acts several times per step.

    When it is fine:
        When the statistics are estimated anew before eval, and where a generator makes samples for
        its discriminator in a forward of its own. Not reported: gradient accumulation,
        multi-crop and Siamese steps, and a discriminator that sees real and fake samples, because
        the gradients of all these forwards are used; what gradient checkpointing repeats (SN301);
        what runs under `no_grad` (SN306).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> def train_step(model, x):
        ...     attacked = x.requires_grad_()
        ...     (direction,) = torch.autograd.grad(model(attacked).sum(), attacked)
        ...     model(x.detach() + 0.1 * direction.sign()).sum().backward()
        >>> report = check(net, torch.randn(64, 4), train_step=train_step, select="SN302")
        >>> report.findings[0].evidence["updates"]
        2

    Fix:
        None that stillnorm could apply: put ``with sn.no_updates(model):`` around the forwards that
        only look for something. Momentum 0 for their time still counts batches, and lets an
        infinity through.

    References:
        davda54/sam#17, #30 and #40; mlcommons/algorithmic-efficiency#325; lyakaap/VAT-pytorch#8;
        Harry24k/adversarial-attacks-pytorch#21.
    """

    code = "SN302"
    slug = "extra-forward-updates"
    severity = "warning"
    needs = ("step",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        step = evidence.step
        updates = {layer: _updates(step.of(layer)) for layer in evidence.layers}
        several = {layer: forwards for layer, forwards in updates.items() if len(forwards) > 1}
        if several and not step.backwards:
            raise CannotTell("train_step runs no backward")
        layers = [
            layer for layer, forwards in several.items() if any(map(_is_extra, forwards.values()))
        ]
        if not layers:
            return
        forwards = updates[max(layers, key=lambda layer: len(updates[layer]))]
        idle = sum(not _trains(calls) for calls in forwards.values())
        displaced = sum(_is_displaced(calls) for calls in forwards.values())
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"one training step updates the statistics of {count(len(layers), 'layer')} "
            f"{len(forwards)} times: {_reasons(idle, displaced)}",
            evidence={
                "layers": len(layers),
                "updates": len(forwards),
                "train nothing": idle,
                "weights taken back": displaced,
            },
            help="with sn.no_updates(model): around the forwards that only look for something",
            where=_extra_lines(layers, updates),
            table=_table(forwards),
        )


def _updates(calls: Sequence[StepCall]) -> Forwards:
    """Return the calls that moved statistics on the way to a gradient, by their forward."""
    forwards: Forwards = {}
    for call in calls:
        if call.moved and not call.in_backward and (call.grad or call.is_recomputed):
            forwards.setdefault(call.forward, []).append(call)
    return forwards


def _trains(calls: Sequence[StepCall]) -> bool:
    return any(call.gradient == "used" for call in calls)


def _is_displaced(calls: Sequence[StepCall]) -> bool:
    return any(call.displaced for call in calls)


def _is_extra(calls: Sequence[StepCall]) -> bool:
    return not _trains(calls) or _is_displaced(calls)


def _reasons(idle: int, displaced: int) -> str:
    reasons = []
    if idle:
        reasons.append(f"{count(idle, 'forward')} {'trains' if idle == 1 else 'train'} nothing")
    if displaced:
        reasons.append(f"{count(displaced, 'forward')} with weights that are taken back")
    return ", ".join(reasons)


def _extra_lines(
    layers: Sequence[NormLayer], updates: dict[NormLayer, Forwards]
) -> tuple[str, ...]:
    calls = (calls for layer in layers for calls in updates[layer].values() if _is_extra(calls))
    return tuple(dict.fromkeys(str(call.site) for some in calls for call in some if call.site))


def _table(forwards: Forwards) -> Table:
    rows = tuple(
        (
            str(call.site or ""),
            str(call.shape[0]),
            "taken back" if call.displaced else "kept",
            _GRADIENT[call.gradient],
        )
        for call, *_ in forwards.values()
    )
    return Table(("forward", "samples", "weights", "gradient"), rows, "lrll", gap=3)
