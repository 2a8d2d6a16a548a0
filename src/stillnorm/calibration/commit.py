"""Writing tensors of a model: all of them, or none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from stillnorm.errors import StateError
from stillnorm.norms import same_bits, write


def write_all(changes: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy each value into its tensor, in place; put all back if anything is raised.

    Args:
        changes: Pairs of a tensor and its new value, of the same shape and dtype.

    Raises:
        StateError: A tensor did not take its value (it overlaps with itself or with another).
    """
    before = [(tensor, tensor.detach().clone()) for tensor, _ in changes]
    try:
        for tensor, value in changes:
            write(tensor, value)
        if not all(same_bits(tensor, value) for tensor, value in changes):
            raise StateError(
                "a buffer did not take the value written to it",
                help="buffers that share memory cannot have values of their own",
            )
    except BaseException:
        for tensor, value in before:
            write(tensor, value)
        raise
