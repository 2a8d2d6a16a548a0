"""SN106: an input that was prepared in another way than in training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.measures.measure import (
    ENOUGH_SAMPLES,
    FAR_MEAN,
    FAR_VARIANCE,
    Distance,
    Samples,
    distance,
)
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import short
from stillnorm.tracing import (
    call,
    copied,
    is_sharded,
    looking,
    read,
    strangers_kept,
    tensors_in,
)
from stillnorm.tracing.samples import sample_moments

MOST = 64  # samples that are tried: twice what a finding needs
COLLAPSES = 4.0  # by how much a change has to shorten the distance
CLOSE = 0.5  # of what counts as far: more may not be left
AS_GOOD = 2.0  # what a simple change leaves beside the best
NOISE = 0.1  # of what counts as far: less is nothing to choose by

_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of 0..1


class WrongInputScale(Rule):
    """The input is scaled, normalised or ordered in another way than in training.

    What it finds:
        A model whose first norm layer is mismatched as SN105 means it, and would not be if the
        images were prepared otherwise: in 0..1, 0..255 or -1..1, normalised by ImageNet's mean and
        deviation or with only the mean taken off, as Caffe's models want it, their channels as they
        are or in reverse order. From the values of the images follows which of these they can be,
        or whether a step was done twice or left out. Every change is tried on some 64 of them, as
        far as the first norm. One is named when it leaves less than half of what SN105 calls far,
        and less than a quarter of the distance without it; of those as good, the simplest.

        Images are (N, 3, H, W). At least 32 are needed. Where no change helps, SN105 reports.
        Measured by benchmarks/data_rules.py on 40 image networks: none named as they are, none with
        each channel scaled and moved at random, none with statistics that are stale.

    Why it matters:
        In train mode the first norm takes any scale back out, so that training on other inputs
        than before goes well and even inference by batch statistics does. In eval mode the running
        statistics are those of the old inputs, and every layer after the first receives something
        it has never seen. Recalibration hides it, at the cost of what the first convolution and its
        padding make of the other offset.

    When it is fine:
        Never for a model that is used as it is. A network that was trained on 0..255 has statistics
        of 0..255, and is not reported when it gets them. Where the first norm is frozen, train and
        eval agree, and a network fine-tuned so has learned to live with it: there it is a remark.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check, recalibrate
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> images = torch.rand(64, 3, 8, 8) * torch.rand(64, 1, 1, 1)
        >>> _ = recalibrate(net, [images])
        >>> check(net, 255 * images).findings[0].message
        'the input is 0..255; the first norm knows 0..1'

    Fix:
        Advice: mend the preprocessing. The weights of the first layer were made for the other
        input, so that statistics estimated anew are the second best.

    References:
        The most frequent answer to "works in train mode, not in eval" for pretrained models;
        pytorch/vision's `ToTensor` and `Normalize`; facebookresearch/detectron2 (BGR, 0..255).
    """

    code = "SN106"
    slug = "wrong-input-scale"
    severity = "error"
    needs = ("forward",)
    explains = ("SN105",)
    spreads = True

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding, at the first norm."""
        first = _first(evidence)
        before = None if first is None else evidence.distance(first, "eval")
        if first is None or before is None or before.samples < ENOUGH_SAMPLES:
            return
        images = list(filter(_is_image, tree_leaves(evidence.measured.batches[0])))
        if not images or not before.is_far():
            return
        if is_sharded(evidence.model):
            raise CannotTell("fully_shard has distributed the model: no forward can stop halfway")
        tried = _try(evidence, first, _changes(images[0]))
        if (chosen := _chosen(tried, before)) is None:
            return
        after = tried[chosen]
        held = evidence.is_held(first)
        yield self.finding(
            (first.path,),
            chosen.words,
            severity="info" if held else None,
            evidence={
                "given": chosen.given.words,
                "trained_on": chosen.wanted.words,
                "reversed": chosen.reverse,
                "mean": before.mean,
                "mean_changed": after.mean,
                "variance_ratio": before.ratio,
                "variance_ratio_changed": after.ratio,
            },
            note="the layer is frozen: train and eval agree" if held else "",
            table=Table(
                ("", "mean off by", "variance"),
                (_row("as given", before), _row("changed", after)),
                "lrr",
                gap=3,
            ),
            help="prepare the input as in training; do not recalibrate, the weights of the first "
            "layer were made for the other input",
            where=evidence.where(first),
        )


def _row(name: str, seen: Distance) -> tuple[str, str, str]:
    return name, f"{seen.mean:.2f} sigma", f"x {short(seen.ratio)}"


def _first(evidence: Evidence) -> NormLayer | None:
    """Return the layer that the forward calls first."""
    called = [layer for layer in evidence.in_order(evidence.layers) if evidence.calls(layer)]
    return called[0] if called else None


# ---------------------------------------------------------------------- what an input can be


@dataclass(frozen=True)
class _Form:
    """One way to prepare images.

    Args:
        words: What it is.
        undo: Makes values of 0..1 of it.
        redo: Makes it of values of 0..1.
    """

    words: str
    undo: Callable[[Tensor], Tensor]
    redo: Callable[[Tensor], Tensor]


def _along(values: tuple[float, ...], x: Tensor) -> Tensor:
    return x.new_tensor(values).view(1, 3, 1, 1)


def _normalised(u: Tensor) -> Tensor:
    return (u - _along(_MEAN, u)) / _along(_DEVIATION, u)


def _plain(x: Tensor) -> Tensor:
    return x * _along(_DEVIATION, x) + _along(_MEAN, x)


_UNIT = _Form("0..1", lambda x: x, lambda u: u)
_NORMALISED = _Form("normalised by ImageNet's mean and deviation", _plain, _normalised)
_WANTED = (
    _UNIT,
    _Form("0..255", lambda x: x / 255, lambda u: 255 * u),
    _NORMALISED,
    _Form("-1..1", lambda x: (x + 1) / 2, lambda u: 2 * u - 1),
    _Form(
        "BGR, 0..255, less ImageNet's mean",
        lambda x: x.flip(1) / 255 + _along(_MEAN, x),
        lambda u: (255 * (u - _along(_MEAN, u))).flip(1),
    ),
)
_GIVEN = (
    *_WANTED,
    _Form("divided by 255 twice", lambda x: 255 * x, lambda u: u / 255),
    _Form(
        "normalised twice by ImageNet's mean and deviation",
        lambda x: _plain(_plain(x)),
        lambda u: _normalised(_normalised(u)),
    ),
    _Form(
        "normalised without a division by 255",
        lambda x: _plain(x) / 255,
        lambda u: _normalised(255 * u),
    ),
    _Form(
        "divided by 255 twice and normalised",
        lambda x: 255 * _plain(x),
        lambda u: _normalised(u / 255),
    ),
)


@dataclass(frozen=True)
class _Change:
    """An input in one form made one of another, or with its channels in reverse order."""

    given: _Form
    wanted: _Form
    reverse: bool

    def __call__(self, x: Tensor) -> Tensor:
        u = self.given.undo(x if x.is_floating_point() else x.float())
        return self.wanted.redo(u.flip(1) if self.reverse else u)

    @property
    def words(self) -> str:
        if self.given is self.wanted:
            return "the input's channels are in reverse order, RGB for BGR or BGR for RGB"
        reverse = ", channels in reverse order" if self.reverse else ""
        return f"the input is {self.given.words}; the first norm knows {self.wanted.words}{reverse}"


def _changes(image: Tensor) -> list[_Change]:
    """Return what could be wrong with an image that has these values, the simple first."""
    given = [form for form in _GIVEN if _can_be(image, form)] or [_UNIT]
    return [
        _Change(form, wanted, reverse)
        for reverse in (False, True)
        for form in given
        for wanted in _WANTED
        if reverse or form is not wanted
    ]


def _can_be(image: Tensor, form: _Form) -> bool:
    """Tell whether undoing gives values of 0..1, not all in one place; resizing overshoots."""
    low, high = form.undo(image.float()).aminmax()
    return bool(low > -0.05) and bool(high < 1.05) and bool(high - low > 0.2)


def _is_image(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() == 4
        and value.shape[1] == 3
        and value.numel() > 0
        and (value.is_floating_point() or value.dtype == torch.uint8)
    )


# ---------------------------------------------------------------------- trying


class _Reached(BaseException):
    """Raised at the first norm, past any `except Exception` of the model's own."""

    def __init__(self, moments: Tensor) -> None:
        super().__init__()
        self.moments = moments


def _stop(module: nn.Module, args: object, kwargs: object) -> None:
    raise _Reached(sample_moments(next(tensors_in((args, kwargs)))))


def _try(evidence: Evidence, first: NormLayer, changes: list[_Change]) -> dict[_Change, Distance]:
    """Measure the first norm's distance under each change, running the model as far as that."""
    mean, var, instance = first.running_mean, first.running_var, first.family == "instance"
    found = {}
    with looking(evidence.model), strangers_kept(evidence.model):
        evidence.model.eval()
        first.module.register_forward_pre_hook(_stop, with_kwargs=True)  # `looking` takes it off
        for change in changes:
            with suppress(Exception):  # an input that the model does not take
                seen = _received(evidence, change)
                if off := distance(mean, var, first.eps, seen, instance=instance):
                    found[change] = off
    return found


def _received(evidence: Evidence, change: _Change) -> Samples:
    """Return what the first norm receives of changed images, a row per sample."""
    runs, rows, count = evidence.measured, [], 0
    for batch, size in zip(runs.batches, runs.batch_sizes, strict=True):
        changed = tree_map(lambda x: change(x) if _is_image(x) else x, copied(batch))
        try:
            call(evidence.model, changed, runs.forward)
        except _Reached as reached:
            mean, var = read(reached.moments)
            rows.append(
                [
                    x.reshape(size if len(x) % size == 0 else 1, -1, x.shape[1]).mean(1)
                    for x in (mean, var + mean.square())
                ]
            )
        count += size
        if count >= MOST:
            break
    means, squares = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return Samples(means, squares, per_batch=len(means) / len(rows))


def _chosen(tried: dict[_Change, Distance], before: Distance) -> _Change | None:
    """Return the change that explains the distance; of two as good, the simpler."""
    left = {change: _size(off) for change, off in tried.items()}
    best = min(left.values(), default=math.inf)
    most = min(CLOSE, _size(before) / COLLAPSES)
    if best > most:
        return None
    as_good = min(most, max(AS_GOOD * best, NOISE))
    return next(change for change, size in left.items() if size <= as_good)


def _size(off: Distance) -> float:
    """Return a distance as a part of what counts as far."""
    return max(off.mean / FAR_MEAN, off.variance / FAR_VARIANCE)
