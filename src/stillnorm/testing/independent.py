"""The assertion that no sample's answer depends on its batch mates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from stillnorm.diagnosis.evidence.composition import samples_in, taken
from stillnorm.diagnosis.measures.answers import Comparison, agree, compare
from stillnorm.errors import BatchError, DependenceError
from stillnorm.reports.numbers import count, short
from stillnorm.tracing import copied, first_line

Answer = TypeVar("Answer")

SINGLES = 4


def assert_batch_independent(
    predict: Callable[[Any], Answer], batch: Any, *, tolerance: float | None = None
) -> Answer:
    """Fail where the answer for a sample depends on what else is in the batch.

    `predict` is asked for the whole batch twice, then for each half, for all but the first sample
    in reverse order, and for four samples alone; each sample's answers are compared.

    Args:
        predict: How you infer: ``predict(batch)``. Its answers are tensors, arrays, numbers or
            labels with a part for each sample, in whatever mappings, lists and objects.
        batch: At least two samples: a tensor, or mappings and sequences of tensors, arrays and
            lists with one item per sample.
        tolerance: How far an answer may move, in standard deviations of all answers; None for what
            rounding explains: 0.001, or 8 units in the last place of the largest answer in its
            dtype, if that is more. Labels and shapes may not change at all.

    Returns:
        The answer to the whole batch.

    Raises:
        DependenceError: An answer changed; the message names the sample and by how much. Or asking
            twice gives two answers (dropout?), or `predict` raises on a part. It is an
            `AssertionError`.
        BatchError: The batch has one sample, or the answers have no part for each sample.

    Mutates:
        What `predict` changes.

    Cost:
        Up to nine calls of `predict`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> x = torch.randn(16, 4)
        >>> assert_batch_independent(net.eval(), x).shape
        torch.Size([16, 8])
        >>> assert_batch_independent(net.train(), x)
        Traceback (most recent call last):
        ...
        stillnorm.errors.DependenceError: 8 of 8 answers change with the batch: sample 0 ...
          help: ...
    """
    size = samples_in(batch)
    if size < 2:
        raise BatchError("the batch has one sample", help="give a batch of two samples or more")
    whole = predict(copied(batch))
    if not agree(whole, predict(copied(batch))):
        raise DependenceError(
            "asked twice for the same batch, predict gives two answers",
            help="call eval() in it, for dropout or sampling is on; or set the seed in it",
        )
    for places in _parts(size):
        part = taken(copied(batch), places, size)
        try:
            answer = predict(part)
        except Exception as error:
            raise DependenceError(
                f"predict takes the batch of {size} and raises on {count(len(places), 'sample')} "
                f"of it: {first_line(error)}",
                help="the error above has the line",
            ) from error
        seen = compare(whole, answer, places, size)
        if not seen.parts:
            raise BatchError(
                "nothing in the answer belongs to one sample",
                help="return one row, or one item, for each sample",
            )
        if changed := seen.beyond(tolerance):
            raise _dependence(seen, changed, size)
    return whole


def _parts(size: int) -> Iterator[Sequence[int]]:
    """Yield the samples to ask for: halves, others in another order, some alone."""
    yield range(size // 2)
    yield range(size // 2, size)
    yield range(size - 1, 0, -1)
    yield from ((place,) for place in range(0, size, max(1, size // SINGLES)))


def _dependence(seen: Comparison, changed: Sequence[int], size: int) -> DependenceError:
    first = seen.places.index(changed[0])
    off = max(float(part.off[first]) for part in seen.parts)
    by = f"moves by {short(off)} of their spread" if off < float("inf") else "is another one"
    of = f"{len(changed)} of {count(len(seen.places), 'answer')}"
    return DependenceError(
        f"{of} change with the batch: sample {changed[0]} {by} among {len(seen.places)} instead of "
        f"{size}",
        help="call eval() in predict; sn.check(model, batches, predict=...) names the layers",
    )
