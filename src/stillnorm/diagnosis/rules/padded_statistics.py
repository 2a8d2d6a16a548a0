"""SN209: padding takes part in the statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillnorm.diagnosis.evidence import SENSITIVE, CannotTell, Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.measure import FAR_MEAN, FAR_VARIANCE
from stillnorm.diagnosis.rule import Rule
from stillnorm.errors import StillnormError
from stillnorm.norms import NormLayer
from stillnorm.reports.numbers import count, short
from stillnorm.tracing import call, copied, looking, strangers_kept, tensors_in, visits


class PaddedStatistics(Rule):
    """Padded positions take part in a norm's statistics.

    What it finds:
        A norm whose input ends, in a different number of positions for each sample, in one constant
        for all channels, as padding does; and whose mean or variance is another without those
        positions, by more than a third of SN105's thresholds. Sequences (N, C, L), sequences
        flattened to (N L, C), and the last axis of maps.

    Why it matters:
        Statistics are then those of speech and silence, text and nothing: they depend on how long
        the batch mates are, and the same sample comes out differently in another batch. In eval
        mode they are those of the training batches' padding.

    When it is fine:
        A norm that masks its input. Not reported: inputs that end in a constant for all samples
        alike, or begin with one too, as the margin of a picture does; ReLU's zeros, which differ
        from channel to channel.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> x, length = 3 + torch.randn(16, 8, 40), torch.arange(16) * 2 + 4
        >>> x[(torch.arange(40) >= length[:, None])[:, None].expand_as(x)] = 0
        >>> check(nn.Sequential(nn.BatchNorm1d(8)), x, select="SN209").findings[0].paths
        ('0',)

    Fix:
        Advice: normalise the valid positions alone, `y[mask] = norm(x[mask])`; a norm that does not
        mix positions (LayerNorm over the channels); batches of like length.

    References:
        pytorch/pytorch#70529; SeanNaren/deepspeech.pytorch#312;
        Tomiinek/Multilingual_Text_to_Speech#81.
    """

    code = "SN209"
    slug = "padded-statistics"
    severity = "warning"
    needs = ("forward",)
    preview = True

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding; the layer with the largest part of padding stands first."""
        padded = _look(evidence)
        if not padded:
            return
        layers = sorted(padded, key=lambda layer: padded[layer].part, reverse=True)
        worst = padded[layers[0]]
        name = layers[0].path or "the norm"
        yield self.finding(
            tuple(layer.path for layer in layers),
            f"{100 * worst.part:.0f} % of the positions that {name} averages are padding",
            evidence={
                "padding": {layer.path: padded[layer].part for layer in layers},
                "mean_moved": worst.mean,
                "variance_changed": worst.variance,
            },
            note=f"without them its mean is {short(worst.mean)} sigma away"
            + (f"; {count(len(layers) - 1, 'more layer')}" if len(layers) > 1 else ""),
            help="normalise the valid positions alone, y[mask] = norm(x[mask]), or use LayerNorm",
            where=evidence.where(layers[0]),
        )


@dataclass(frozen=True)
class _Padding:
    """How much of an input is padding, and what it does to mean and variance."""

    part: float
    mean: float
    variance: float

    @property
    def matters(self) -> bool:
        return self.mean > SENSITIVE * FAR_MEAN or self.variance > SENSITIVE * FAR_VARIANCE


def _look(evidence: Evidence) -> dict[NormLayer, _Padding]:
    """Run the first batch and measure each norm's input when it comes by."""
    model, runs = evidence.model, evidence.measured
    layers = {x.module: x for x in evidence.layers if evidence.trains_by_batch(x)}
    found: dict[NormLayer, _Padding] = {}

    def enter(module: nn.Module, args: Any) -> None:
        layer = layers.get(module)
        x = next(tensors_in(args), None)
        if layer is None or x is None or layer in found:
            return
        padding = _padding(x, runs.batch_sizes[0], layer.eps)
        if padding is not None and padding.matters:
            found[layer] = padding

    try:
        with looking(model), strangers_kept(model), visits(enter, lambda *_: None):
            model.eval()
            call(model, copied(runs.batches[0]), runs.forward)
    except StillnormError as error:
        raise CannotTell(error.fact) from error
    return found


def _padding(x: Tensor, samples: int, eps: float) -> _Padding | None:
    """Measure the padding of an input; None where it has none."""
    rows = _as_sequences(x, samples)
    if rows is None:
        return None
    ends, begins = _constant(rows), _constant(rows.flip(-1))  # (N,) positions
    ends = ends.where((ends > 1) & (begins <= 1), 0)
    if bool((ends == ends[0]).all()):  # all alike: a margin, or no padding at all
        return None
    length = rows.shape[-1]
    valid = torch.arange(length) < (length - ends)[:, None]  # (N, L)
    if not valid.any():
        return None
    every, kept = rows.movedim(1, 0).flatten(1), rows.permute(1, 2, 0, 3)[:, :, valid].flatten(1)
    mean, var = every.mean(1), every.var(1, correction=0)  # (C,)
    own_mean, own_var = kept.mean(1), kept.var(1, correction=0)
    moved = (mean - own_mean) / (own_var + eps).sqrt()
    changed = 2 * (var - own_var) / (var + own_var + 2 * eps)
    return _Padding(float(1 - valid.double().mean()), _rms(moved), _rms(changed))


def _as_sequences(x: Tensor, samples: int) -> Tensor | None:
    """Return (N, C, M, L) in double precision on the CPU, L being the axis that padding is on."""
    if x.dim() == 2 and samples and len(x) % samples == 0 and len(x) > samples:
        x = x.reshape(samples, -1, x.shape[1]).transpose(1, 2)
    if x.dim() < 3 or x.shape[-1] <= 2 or len(x) <= 1 or not x.is_floating_point():
        return None
    return x.cpu().double().reshape(*x.shape[:2], -1, x.shape[-1])


def _constant(x: Tensor) -> Tensor:
    """Return how many of the last positions of each sample equal the last one, in all channels."""
    same = (x == x[..., -1:]).flatten(1, -2).all(1)  # (N, L)
    return same.flip(-1).cumprod(-1).sum(-1)


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
