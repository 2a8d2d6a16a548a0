"""Merging what several processes have gathered: one collective, the same result on every one.

Every rank sends one vector of the same length, whether it had batches or none, and whether it went
well or not: a rank that failed says so, and all raise. The vectors are merged in the order of the
ranks, in float64, by every rank for itself, so that all have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from stillnorm.errors import CalibrationError, StillnormError
from stillnorm.tracing import first_line

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group: TypeAlias = "ProcessGroup | Literal['self'] | None"

_MESSAGE = 400  # bytes of a failed rank's error that the others report


class Ranks:
    """The processes that share a recalibration.

    Args:
        group: A process group; None for all processes, or for this one where there are no others;
            "self" for this one alone.
        device: A device of the model, for groups that cannot send what is on the CPU.
    """

    def __init__(self, group: Group, device: torch.device) -> None:
        if isinstance(group, str) and group != "self":
            raise CalibrationError(
                f"there is no group {group!r}", help='a process group, "self", or None for all'
            )
        self._group: ProcessGroup | None = None
        self._device = device
        if group == "self" or not dist.is_available() or not dist.is_initialized():
            return
        chosen = dist.group.WORLD if group is None else group
        if chosen is not None and chosen.size() > 1:
            self._group = chosen
            if torch.device("cpu") in chosen._device_types:
                self._device = torch.device("cpu")

    @property
    def size(self) -> int:
        """The number of processes."""
        return 1 if self._group is None else self._group.size()

    def gathered(self, work: Callable[[], Tensor], length: int) -> list[Tensor]:
        """Do the work and return what it returned on every rank, in their order.

        Args:
            work: Returns a vector, float64.
            length: Its length.

        Raises:
            CalibrationError: It raised on another rank.
        """
        if self._group is None:
            return [work()]
        try:
            vector = work()
        except Exception as error:
            self._exchange(self._group, _failure(error), torch.zeros(length).double())
            raise
        results = self._exchange(self._group, torch.zeros(_MESSAGE, dtype=torch.float64), vector)
        for rank, (message, _) in enumerate(results):
            if message.any():
                raise CalibrationError(
                    f"rank {rank} failed: {_text(message)}",
                    help="nothing was changed, on any rank",
                )
        return [vector for _, vector in results]

    def _exchange(
        self, group: ProcessGroup, message: Tensor, vector: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        sent = torch.cat((message, vector)).to(self._device)
        received = [torch.empty_like(sent) for _ in range(group.size())]
        try:
            dist.all_gather(received, sent, group=group)
        except RuntimeError as error:
            raise CalibrationError(
                f"a rank is gone: {first_line(error)}",
                help="look at the output of the others; nothing was changed on this one",
            ) from error
        return [(part[:_MESSAGE].cpu(), part[_MESSAGE:].cpu()) for part in received]


def _failure(error: Exception) -> Tensor:
    fact = error.fact if isinstance(error, StillnormError) else first_line(error)
    text = fact.encode()[:_MESSAGE]
    return torch.tensor([*text, *[0] * (_MESSAGE - len(text))], dtype=torch.float64)


def _text(message: Tensor) -> str:
    return bytes(int(c) for c in message.tolist() if c).decode(errors="replace")
