"""The sequential passes: each layer sees what those before it give with their final statistics.

The result is the fixed point of eval mode: the statistics are the moments of what each layer
receives in eval mode. It does not depend on how the samples are divided into batches.

The first pass is the pooled one. It also tells what each layer's input depends on, and with that
the order: in each stage those layers are measured whose input depends on settled layers alone, and
every forward stops after the last of them. A forward goes on from there in the next stage as long
as its tape fits into memory, and starts from the beginning otherwise; see `tracing.replay`. The
last pass, in eval mode, measures all layers again. Where it finds something else, because what is
called depends on values or a replay went wrong, the layers are settled once more, with whole
forwards only; if that is not the fixed point either, it is an error.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stillnorm.calibration.data import Data
from stillnorm.calibration.pool import Pool, Pools, statistics_of
from stillnorm.calibration.pooled import Pass, pack, packed_length, unpack
from stillnorm.calibration.progress import Progress
from stillnorm.calibration.ranks import Ranks
from stillnorm.errors import BatchError, CalibrationError
from stillnorm.norms import NormLayer, write
from stillnorm.state import attributes_kept
from stillnorm.tracing import (
    Diverged,
    Normalization,
    Replay,
    Run,
    Tape,
    by_whole_batch,
    call,
    copied,
    device_of,
    free_bytes,
    is_sharded,
    looking,
    train_by_input,
    training_by_input,
)

# How far the last pass may lie from the statistics, in deviations and relative to the variance:
# kernels that add up in another order each time are within it, a wrong result is not.
_AGREES = 1e-4

# The part of the free memory that tapes may take.
_SHARE = 0.5


@dataclass(eq=False)
class _Batch:
    """One batch, and how far its forward has come.

    Args:
        index: Its number.
        value: The batch.
        tape: What it has computed; None where it starts from the beginning each time.
        nbytes: The size of the tape.
        calls: How often it calls each layer.
    """

    index: int
    value: object
    tape: Tape | None = None
    nbytes: int = 0
    calls: Counter[nn.Module] = field(default_factory=Counter)


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one pass has shown.

    Args:
        found: What the layers received, on all ranks.
        depends: By number of the layer, the bits of those that its input depends on.
    """

    found: Pass
    depends: list[int]


def sequential_pass(
    model: nn.Module, layers: Sequence[NormLayer], data: Data, ranks: Ranks
) -> Pass:
    """Settle the layers one after another.

    Raises:
        CalibrationError: The model is sharded; there is no batch; a layer receives NaN or infinity;
            or what the model computes changes from run to run.
        BatchError: A batch does not fit, or the forward raised.
    """
    if is_sharded(model):
        raise CalibrationError(
            "fully_shard has distributed the model: its units gather their weights with every "
            "forward, and one that stops halfway leaves them waiting",
            help='method="pooled", with as many batches on every rank',
        )
    return _Stages(model, layers, data, ranks).run()


class _Stages:
    """The state between the stages."""

    def __init__(
        self, model: nn.Module, layers: Sequence[NormLayer], data: Data, ranks: Ranks
    ) -> None:
        self.model, self.layers, self.data, self.ranks = model, layers, data, ranks
        self.bit = {layer.module: 1 << i for i, layer in enumerate(layers)}
        self.settled = 0
        self.batches: list[_Batch] = []
        self.samples = self.runs = 0
        self.error: float | None = None
        self.room = 0

    def run(self) -> Pass:
        """Settle the layers in stages; where that has gone wrong, by whole forwards."""
        with looking(self.model):
            self.model.eval()
            first = self.first()
            wrong = ""
            for settle in (self.in_stages, self.by_whole_forwards):
                self.settled = 0
                for pool in first.found.pools:
                    _give(pool)
                try:
                    final, circular = settle(first)
                except CalibrationError:
                    if settle == self.by_whole_forwards:
                        raise
                    continue  # a replay may have made a NaN
                other = self.disagreeing(final, circular)
                if other is None:
                    found = first.found
                    return Pass(final, found.batches, found.samples, tuple(circular))
                wrong = other.path
        raise CalibrationError(
            f"{wrong} receives something else each time that the model runs on the same batches",
            help='method="pooled" needs one run only; nothing was changed',
        )

    # ------------------------------------------------------------------ in what order

    def in_stages(self, first: _Seen) -> tuple[list[Pool], list[NormLayer]]:
        """Settle the layers in the order that the first pass has shown."""
        final = list(first.found.pools)
        circular: list[NormLayer] = []
        while ready := self.ready(range(len(self.layers)), first.depends):
            layers = [self.layers[i] for i in ready]
            clear = all(self.is_clear(first.depends[i]) for i in ready)
            circular += [] if clear else layers
            if self.settled or circular:
                for i, pool in zip(ready, self.stage(layers), strict=True):
                    final[i] = pool
            self.settle(ready, final)
        return final, circular

    def by_whole_forwards(self, first: _Seen) -> tuple[list[Pool], list[NormLayer]]:
        """Settle the layers in the order that whole forwards show, anew after each stage."""
        for batch in self.batches:
            batch.tape = None
        final = [Pool.empty(layer) for layer in self.layers]
        circular: list[NormLayer] = []
        while waiting := [i for i in range(len(self.layers)) if not self.settled >> i & 1]:
            seen = self.whole([self.layers[i] for i in waiting], ())
            found = dict(zip(waiting, seen.found.pools, strict=True))
            reached = [i for i in waiting if found[i].calls]
            ready = self.ready(reached, seen.depends)
            if not ready:
                break
            if not all(self.is_clear(seen.depends[i]) for i in ready):
                circular += [self.layers[i] for i in ready]
            for i in ready:
                final[i] = found[i]
            self.settle(ready, final)
        return final, circular

    def ready(self, among: Iterable[int], depends: Sequence[int]) -> list[int]:
        """Return the layers to settle next; of those that wait for each other, one."""
        waiting = [i for i in among if not self.settled >> i & 1]
        ready = [i for i in waiting if self.is_clear(depends[i])]
        if waiting and not ready:
            ready = [min(waiting, key=lambda i: (depends[i] & ~self.settled).bit_count())]
        return ready

    def is_clear(self, depends: int) -> bool:
        """Tell whether all are settled."""
        return not depends & ~self.settled

    def settle(self, ready: Iterable[int], final: Sequence[Pool]) -> None:
        """Let the layers normalise by what they have received."""
        for i in ready:
            _give(final[i])
            self.settled |= 1 << i

    # ------------------------------------------------------------------ over all batches

    def first(self) -> _Seen:
        """Read the batches and run the pooled pass."""

        def read() -> Iterator[_Batch]:
            self.room = int(_SHARE * free_bytes(device_of(self.model)))
            for index, value in enumerate(self.data.each()):
                kept = copied(value)
                self.batches.append(_Batch(index, kept, Tape(copied(kept))))
                yield self.batches[-1]
                if self.data.is_enough(index + 1, self.error, self.ranks.size):
                    return

        by_batch = train_by_input(self.model, self.layers)
        with training_by_input(by_batch):
            return self.whole(self.layers, by_batch, read)

    def whole(
        self,
        layers: Sequence[NormLayer],
        by_batch: Sequence[NormLayer],
        batches: Callable[[], Iterable[_Batch]] | None = None,
    ) -> _Seen:
        """Run all batches to the end; return what the layers received and what that depends on."""
        depends = [0] * len(self.layers)
        first = batches is not None

        def work() -> Tensor:
            pools = Pools(layers)
            for batch in self.batches if batches is None else batches():
                seen, replay = self.forward(batch, layers, by_batch, whole=True)
                for i, layer in enumerate(self.layers):
                    depends[i] |= replay.depends.get(layer.module, 0)
                pools.take(seen, batch.index)
                if first:
                    batch.calls = Counter(one.layer.module for one in seen)
                    self.samples += seen[0].samples if seen else 0
                    self.error = self.data.error(pools)
                self.tell()
            bits = [(d >> i) & 1 for d in depends for i in range(len(self.layers))]
            gathered = pack(len(self.batches), self.samples, pools)
            return torch.cat((torch.tensor(bits, dtype=torch.float64), gathered))

        square = len(self.layers) ** 2
        vectors = self.ranks.gathered(work, square + packed_length(layers))
        bits = torch.stack([vector[:square] for vector in vectors]).sum(0)
        rows = bits.reshape(len(self.layers), -1).tolist()
        merged = [sum(1 << i for i, n in enumerate(row) if n) for row in rows]
        return _Seen(unpack(layers, [vector[square:] for vector in vectors]), merged)

    def stage(self, layers: Sequence[NormLayer]) -> list[Pool]:
        """Measure what the layers receive, over all batches, each as far as it calls them."""

        def work() -> Tensor:
            pools = Pools(layers)
            for batch in self.batches:
                if any(layer.module in batch.calls for layer in layers):
                    seen, _ = self.forward(batch, layers, ())
                    pools.take(seen, batch.index)
                    self.tell()
            return pack(len(self.batches), self.samples, pools)

        return unpack(layers, self.ranks.gathered(work, packed_length(layers))).pools

    def disagreeing(self, final: Sequence[Pool], circular: Sequence[NormLayer]) -> NormLayer | None:
        """Measure all layers in eval mode; return one that receives something else than before."""
        for batch in self.batches:
            batch.tape = None
        self.settled = -1
        for want, got in zip(final, self.whole(self.layers, ()).found.pools, strict=True):
            if want.layer not in circular and _distance(want, got) > _AGREES:
                return want.layer
        return None

    # ------------------------------------------------------------------ one forward

    def forward(
        self,
        batch: _Batch,
        layers: Sequence[NormLayer],
        by_batch: Sequence[NormLayer],
        *,
        whole: bool = False,
    ) -> tuple[list[Normalization], Replay]:
        """Run one batch until the layers have been measured, or to the end.

        It goes on where its tape ends. Whatever a replay makes of a model, it cannot be told from
        an error of the model's own: that is raised by a run from the beginning.
        """
        self.runs += 1
        if batch.tape is None:
            return self._forward(batch, layers, by_batch, None, whole)
        is_replay = bool(batch.tape.entries)
        try:
            result = self._forward(batch, layers, by_batch, batch.tape, whole)
        except (Diverged, BatchError):
            if not is_replay:
                raise
            self.drop(batch)
            return self._forward(batch, layers, by_batch, None, whole)
        before, batch.nbytes = batch.nbytes, batch.tape.nbytes()
        self.room += before - batch.nbytes
        if batch.tape.is_broken or self.room < 0:
            self.drop(batch)
        return result

    def drop(self, batch: _Batch) -> None:
        """Let the batch start from the beginning from here on."""
        self.room += batch.nbytes
        batch.tape, batch.nbytes = None, 0

    def _forward(
        self,
        batch: _Batch,
        layers: Sequence[NormLayer],
        by_batch: Sequence[NormLayer],
        tape: Tape | None,
        whole: bool,
    ) -> tuple[list[Normalization], Replay]:
        follows = whole or tape is not None
        unsettled = {m: bit for m, bit in self.bit.items() if follows and not bit & self.settled}
        calls = -1 if whole else sum(batch.calls[layer.module] for layer in layers)
        replay = Replay(tape, unsettled, lambda: len(run.seen) == calls)

        def forward(model: nn.Module, value: Any) -> None:
            with replay.running():
                call(model, value, self.data.forward)

        run = Run(self.model, layers, by_batch, forward, by_whole_batch)
        run.batches = batch.index
        with contextlib.nullcontext() if whole else attributes_kept(self.model):
            # Other containers, the same tensors: models take things out of what they are given.
            value = copied(batch.value) if tape is None else tree_map(lambda t: t, tape.batch)
            _, seen = run(value)
        return seen, replay

    def tell(self) -> None:
        """Report progress."""
        settled = sum(1 for bit in self.bit.values() if bit & self.settled)
        samples = self.samples * self.runs // max(1, len(self.batches))
        self.data.tell(Progress(self.runs, samples, settled, len(self.layers), self.error))


def _give(pool: Pool) -> None:
    """Let the layer normalise by what it has received."""
    if (moments := pool.estimate()) is not None:
        tensors = pool.layer.tensors()
        for name, value in statistics_of(pool.layer, moments).items():
            write(tensors[name], value)


def _distance(one: Pool, other: Pool) -> float:
    """Return how far two estimates lie apart: in deviations, and relative to the variance."""
    a, b = one.moments, other.moments
    if not torch.equal(a.n, b.n):
        return math.inf
    if one.estimate() is None:
        return 0.0
    var = a.variance() + one.layer.eps
    mean = (a.mean - b.mean).abs() / var.sqrt()
    return float(torch.maximum(mean, (a.variance() - b.variance()).abs() / var).max())
