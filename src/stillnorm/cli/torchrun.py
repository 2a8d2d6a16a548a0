"""A command that torchrun has started several times: the processes share the work, one speaks.

    torchrun --nproc-per-node 2 -m stillnorm recalibrate net.py:make --data net.py:train

What fails on one rank fails on all, and rank 0 says so before any of them ends: torchrun kills the
others as soon as one has.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import click
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from stillnorm.cli.failures import WHOLE, describe, report
from stillnorm.errors import StillnormError
from stillnorm.tracing import each_batch

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The processes of one command, seen from one of them.

    Args:
        rank: Which one this is.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    def device(self, name: str | None) -> str | None:
        """Return the device of this one: "cuda" is another for each."""
        return f"cuda:{os.environ['LOCAL_RANK']}" if name == "cuda" and self.size > 1 else name

    def share(self, batches: object, limit: int | None) -> object:
        """Return the batches of this one, where all together take at most `limit`."""
        return batches if self.size == 1 else _Share(batches, self, limit)

    def all(self, work: Callable[[], T]) -> T:
        """Do the work; return what it returned here once it has gone well everywhere.

        Raises:
            StillnormError: It raised on another rank.
        """
        if self.size == 1:
            return work()
        try:
            result = work()
        except Exception as error:
            self._exchange(_fact_and_help(error))
            raise
        for rank, failure in enumerate(self._exchange(None)):
            if failure is not None:
                fact, help = failure
                raise StillnormError(f"rank {rank} failed: {fact}", help=help)
        return result

    def _exchange(self, failure: tuple[str, str] | None) -> list[Any]:
        told: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(told, failure)
        except RuntimeError as error:
            raise StillnormError(
                f"another rank is gone: {str(error).splitlines()[0]}", help="torchrun says which"
            ) from error
        return told


@contextlib.contextmanager
def processes(device: str | None, *, whole: bool) -> Iterator[Processes]:
    """Join the processes of this command, if torchrun started it; this one alone otherwise.

    Args:
        device: The device that was asked for.
        whole: Whether to show the traceback of what fails, on whatever rank.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield Processes()
        return
    on_cuda = (device or "").startswith("cuda") and torch.cuda.is_available()
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    here = Processes(dist.get_rank(), dist.get_world_size())
    try:
        with _silent(here.rank > 0):
            _seed_alike()
            yield here
    except KeyboardInterrupt as error:  # the others may be anywhere: no farewell
        with _silent(here.rank > 0):
            raise click.exceptions.Exit(report(error, whole=whole)) from None
    except Exception as error:
        with _silent(here.rank > 0 and not whole):
            code = _say(error, whole=whole)
        with contextlib.suppress(RuntimeError):  # another one is gone
            dist.all_reduce(torch.zeros(1))
        raise click.exceptions.Exit(code) from None
    finally:
        gc.collect()  # a group that a cycle still holds when Python exits can abort the process
        dist.destroy_process_group()


@contextlib.contextmanager
def _silent(silent: bool) -> Iterator[None]:
    if not silent:
        yield
        return
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _seed_alike() -> None:
    """Give all the random numbers of rank 0: the same model, the same order of the batches."""
    seed = torch.tensor([torch.initial_seed() % 2**63])
    dist.broadcast(seed, 0)
    torch.manual_seed(int(seed))
    random.seed(int(seed))
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(int(seed) % 2**32)


def _say(error: Exception, *, whole: bool) -> int:
    """Print what went wrong, and return the exit code."""
    if not isinstance(error, click.ClickException):
        return report(error, whole=whole)
    error.show()
    return error.exit_code


def _fact_and_help(error: Exception) -> tuple[str, str]:
    if isinstance(error, StillnormError):
        return error.fact, error.help
    if isinstance(error, click.ClickException):
        return error.format_message(), ""
    return describe(error), WHOLE


# ---------------------------------------------------------------------------------- the batches


class _Share:
    """All batches of a loader whose sampler shards them already, every n-th of anything else."""

    def __init__(self, batches: object, who: Processes, limit: int | None) -> None:
        self._batches = batches
        self._limit = limit
        self._mine = range(who.rank, 2**62 if limit is None else limit, who.size)
        if _is_sharded(batches):
            self._mine = range(len(self._mine))

    def __iter__(self) -> Iterator[object]:
        return islice(each_batch(self._batches), self._mine.start, self._mine.stop, self._mine.step)

    def __len__(self) -> int:
        known = length(self._batches, self._limit)
        if known is None:
            raise TypeError
        return len(range(self._mine.start, min(known, self._mine.stop), self._mine.step))


def _is_sharded(batches: object) -> bool:
    inner = getattr(getattr(batches, "batch_sampler", None), "sampler", None)
    return any(
        isinstance(sampler, DistributedSampler)
        for sampler in (getattr(batches, "sampler", None), inner)
    )


def length(batches: object, limit: int | None) -> int | None:
    """Return how many batches there are, at most `limit`; None where nobody knows."""
    if isinstance(batches, Tensor | Mapping | list | tuple):
        known = sum(1 for _ in each_batch(batches))
    else:
        try:
            known = len(batches)  # type: ignore[arg-type]
        except Exception:  # of the user's own __len__, too
            return limit
    return known if limit is None else min(known, limit)
