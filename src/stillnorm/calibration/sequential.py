"""The sequential passes: each layer sees what those before it give with their final statistics.

The result is the fixed point of eval mode: the statistics are the moments of what each layer
receives in eval mode. It does not depend on how the samples are divided into batches.

The first pass is the pooled one. It also tells what each layer's input depends on, and with that
the order: in each stage those layers are measured whose input depends on settled layers alone, and
every forward stops after the last of them. A forward goes on from there in the next stage as long
as its tape fits into memory, and starts from the beginning otherwise; see `tracing.replay`. The
last pass, in eval mode, measures all layers again: what is not the fixed point is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from stillnorm.calibration.data import Data
from stillnorm.calibration.moments import Moments
from stillnorm.calibration.pool import Pool, Pools
from stillnorm.calibration.pooled import Pass, pack, packed_length, unpack
from stillnorm.calibration.progress import Progress
from stillnorm.calibration.ranks import Ranks
from stillnorm.errors import CalibrationError
from stillnorm.norms import NormLayer, write
from stillnorm.tracing import (
    Diverged,
    Normalization,
    Replay,
    Run,
    Tape,
    by_kernel,
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
        with looking(self.model):
            self.model.eval()
            first, depends = self.first()
            final = list(first.pools)
            for pool in first.pools:
                _give(pool)
            circular: list[NormLayer] = []
            while ready := self.ready(depends):
                layers = [self.layers[i] for i in ready]
                if not all(self.is_clear(depends[i]) for i in ready):
                    circular += layers
                if self.settled or circular:
                    for i, pool in zip(ready, self.stage(layers), strict=True):
                        final[i] = pool
                        _give(pool)
                for i in ready:
                    self.settled |= 1 << i
            self.check(final, circular)
        return Pass(final, first.batches, first.samples, tuple(circular))

    def first(self) -> tuple[Pass, list[int]]:
        """Run the pooled pass and return what it gathered, and what each layer depends on."""
        depends = [0] * len(self.layers)

        def work() -> Tensor:
            pools = Pools(self.layers)
            by_batch = train_by_input(self.model, self.layers)
            self.room = int(_SHARE * free_bytes(device_of(self.model)))
            with training_by_input(by_batch):
                for index, value in enumerate(self.data.each()):
                    batch = _Batch(index, value, Tape(copied(value)))
                    seen, replay = self.forward(batch, self.layers, by_batch)
                    batch.calls = Counter(one.layer.module for one in seen)
                    for i, layer in enumerate(self.layers):
                        depends[i] |= replay.depends[layer.module]
                    self.batches.append(batch)
                    pools.take(seen, index)
                    self.samples += seen[0].samples if seen else 0
                    self.error = self.data.error(pools)
                    self.tell()
                    if self.data.is_enough(len(self.batches), self.error, self.ranks.size):
                        break
            bits = [(d >> i) & 1 for d in depends for i in range(len(self.layers))]
            gathered = pack(len(self.batches), self.samples, pools)
            return torch.cat((torch.tensor(bits, dtype=torch.float64), gathered))

        square = len(self.layers) ** 2
        vectors = self.ranks.gathered(work, square + packed_length(self.layers))
        seen = torch.stack([vector[:square] for vector in vectors]).sum(0)
        rows = seen.reshape(len(self.layers), -1).tolist()
        merged = [sum(1 << i for i, n in enumerate(row) if n) for row in rows]
        return unpack(self.layers, [vector[square:] for vector in vectors]), merged

    def ready(self, depends: Sequence[int]) -> list[int]:
        """Return the layers to settle next; of those that wait for each other, one."""
        waiting = [i for i in range(len(self.layers)) if not self.settled >> i & 1]
        ready = [i for i in waiting if self.is_clear(depends[i])]
        if waiting and not ready:
            ready = [min(waiting, key=lambda i: (depends[i] & ~self.settled).bit_count())]
        return ready

    def is_clear(self, depends: int) -> bool:
        return not depends & ~self.settled

    def stage(self, layers: Sequence[NormLayer]) -> list[Pool]:
        """Measure what the layers receive, over all batches of all ranks."""

        def work() -> Tensor:
            pools = Pools(layers)
            for batch in self.batches:
                if any(layer.module in batch.calls for layer in layers):
                    seen, _ = self.forward(batch, layers, ())
                    pools.take(seen, batch.index)
                    self.tell()
            return pack(len(self.batches), self.samples, pools)

        return unpack(layers, self.ranks.gathered(work, packed_length(layers))).pools

    def check(self, final: Sequence[Pool], circular: Sequence[NormLayer]) -> None:
        """Measure all layers in eval mode and compare."""
        for batch in self.batches:
            batch.tape = None
        self.settled = -1
        layers = [pool.layer for pool in final if pool.layer not in circular and pool.estimate()]
        expected = {pool.layer: pool for pool in final}
        for pool in self.stage(layers):
            want, got = expected[pool.layer].estimate(), pool.estimate()
            if want is None or got is None or _distance(want, got, pool.layer.eps) > _AGREES:
                raise CalibrationError(
                    f"{pool.layer.path} receives something else each time that the model runs on "
                    "the same batches",
                    help='method="pooled" needs one run only; nothing was changed',
                )

    # ------------------------------------------------------------------ one forward

    def forward(
        self,
        batch: _Batch,
        layers: Sequence[NormLayer],
        by_batch: Sequence[NormLayer],
    ) -> tuple[list[Normalization], Replay]:
        """Run one batch until the layers have been measured; go on where its tape ends."""
        unsettled = {module: bit for module, bit in self.bit.items() if not bit & self.settled}
        calls = sum(batch.calls[layer.module] for layer in layers) if batch.calls else -1
        self.runs += 1

        def on(tape: Tape | None) -> tuple[list[Normalization], Replay]:
            replay = Replay(tape, unsettled, lambda: len(run.seen) == calls)

            def forward(model: nn.Module, value: Any) -> None:
                with replay.running():
                    call(model, value, self.data.forward)

            run = Run(self.model, layers, by_batch, forward, by_kernel)
            run.batches = batch.index
            _, seen = run(copied(batch.value) if tape is None else tape.batch)
            return seen, replay

        if batch.tape is None:
            return on(None)
        try:
            seen, replay = on(batch.tape)
        except Diverged:
            batch.tape = None
            return on(None)
        before, batch.nbytes = batch.nbytes, batch.tape.nbytes()
        self.room += before - batch.nbytes
        if batch.tape.is_broken or self.room < 0:
            self.room += batch.nbytes
            batch.tape, batch.nbytes = None, 0
        return seen, replay

    def tell(self) -> None:
        """Report progress."""
        settled = sum(1 for bit in self.bit.values() if bit & self.settled)
        samples = self.samples * self.runs // max(1, len(self.batches))
        self.data.tell(Progress(self.runs, samples, settled, len(self.layers), self.error))


def _give(pool: Pool) -> None:
    """Let the layer normalise by what it has received."""
    if (moments := pool.estimate()) is not None:
        layer = pool.layer.module
        write(layer.get_buffer("running_mean"), moments.mean)
        write(layer.get_buffer("running_var"), moments.variance())


def _distance(one: Moments, other: Moments, eps: float) -> float:
    """Return how far two estimates lie apart: in deviations, and relative to the variance."""
    var = one.variance() + eps
    mean = (one.mean - other.mean).abs() / var.sqrt()
    return float(torch.maximum(mean, (one.variance() - other.variance()).abs() / var).max())
