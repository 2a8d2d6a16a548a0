"""The assertion that training leaves norm layers as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn

from stillnorm.errors import VerifyError
from stillnorm.norms import Layers, find_norms
from stillnorm.state import snapshot

Result = TypeVar("Result")


def assert_frozen_through(
    model: nn.Module, step: Callable[[], Result], layers: Layers = None
) -> Result:
    """Run a step of training, and fail unless norm layers come out of it bit for bit as they were.

    A layer fails when, before or after the step, `Snapshot.verify` says so: a bit of its
    statistics or parameters has changed, or `model.train()` would thaw it (momentum 0 and
    `requires_grad=False` are not enough).

    Args:
        model: The model.
        step: Trains it: one step, an epoch, a whole `trainer.fit`. It is called without arguments.
        layers: Which norm layers are to stay; see `select`. None for all.

    Returns:
        What `step` returned.

    Raises:
        VerifyError: A layer is not frozen, or has moved; the message names layer, tensor, channel
            and size. Or the step did nothing with the model, which proves nothing. It is an
            `AssertionError`.
        SelectorError: `layers` matches nothing.

    Mutates:
        What `step` changes; nothing is put back.

    Cost:
        That of the step, and two copies of the norm layers' tensors.

    Example:
        >>> import torch
        >>> import stillnorm as sn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> def step():
        ...     net.train()(torch.randn(16, 4)).sum().backward()
        ...     optimizer.step()
        >>> assert_frozen_through(net, step)
        Traceback (most recent call last):
        ...
        stillnorm.errors.VerifyError: 1: would normalise by the batch in train()
          help: ...
        >>> _ = net(torch.randn(16, 4)), sn.freeze(net)
        >>> assert_frozen_through(net, step)
    """
    if not find_norms(model):
        raise VerifyError(
            "the model has no norm layer, so nothing is proved", help="give the model that has them"
        )
    before = snapshot(model)
    before.verify(model, layers)
    marks = _marks(model)
    result = step()
    before.verify(model, layers)
    if _marks(model) == marks:
        raise VerifyError(
            "the step wrote no parameter of the model and left no gradient, so nothing is proved",
            help="step= trains the very model that was given, not a copy",
        )
    return result


def _marks(model: nn.Module) -> list[tuple[int, ...]]:
    """Return what a step of training changes: how often parameters and gradients were written."""
    tensors = (x for p in model.parameters() for x in (p, p.grad))
    return [(id(x), -1 if x is None or x.is_inference() else x._version) for x in tensors]
