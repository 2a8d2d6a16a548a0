"""The pooled pass: the moments of everything that each layer receives, in one go over the batches.

The layers being recalibrated normalise by the batch, as they did in training; the rest of the model
is in eval mode. What they receive is measured and kept here: no buffer of the model is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillnorm.calibration.data import Data
from stillnorm.calibration.pool import Pool, Pools
from stillnorm.calibration.progress import Progress
from stillnorm.calibration.ranks import Ranks
from stillnorm.errors import CalibrationError
from stillnorm.norms import NormLayer
from stillnorm.tracing import by_whole_batch, running, train_by_input


@dataclass(frozen=True)
class Pass:
    """What passes over the batches have gathered, of all ranks together.

    Args:
        pools: One for each layer; empty for one that was not reached.
        batches: The number of batches.
        samples: The number of samples in them, as the first norm of each forward counts them.
        circular: Layers whose input depends on their own statistics.
    """

    pools: list[Pool]
    batches: int
    samples: int
    circular: tuple[NormLayer, ...] = ()


def pooled_pass(model: nn.Module, layers: Sequence[NormLayer], data: Data, ranks: Ranks) -> Pass:
    """Run the model over the batches once and gather what each of `layers` receives.

    Raises:
        CalibrationError: There is no batch, or a layer receives NaN or infinity.
        BatchError: A batch does not fit, or the forward raised.
    """

    def work() -> Tensor:
        pools = Pools(layers)
        batches, samples = 0, 0
        by_batch = train_by_input(model, layers)
        with running(
            model, forward=data.forward, flow="batch", by_batch=by_batch, measure=by_whole_batch
        ) as run:
            for batch in data.each():
                _, seen = run(batch)
                pools.take(seen, batches)
                batches += 1
                samples += seen[0].samples if seen else 0
                error = data.error(pools)
                data.tell(Progress(batches, samples, 0, len(layers), error))
                if data.is_enough(batches, error, ranks.size):
                    break
        return pack(batches, samples, pools)

    return unpack(layers, ranks.gathered(work, packed_length(layers)))


def pack(batches: int, samples: int, pools: Pools) -> Tensor:
    """Return what one rank has gathered as one vector."""
    counts = torch.tensor([batches, samples], dtype=torch.float64)
    return torch.cat((counts, pools.to_vector()))


def packed_length(layers: Sequence[NormLayer]) -> int:
    """Return the length of that vector."""
    return 2 + Pools(layers).length


def unpack(layers: Sequence[NormLayer], vectors: Sequence[Tensor]) -> Pass:
    """Return what all ranks have gathered, merged in their order.

    Raises:
        CalibrationError: There was no batch on any rank.
    """
    pools, *others = (Pools.of_vector(layers, vector[2:]) for vector in vectors)
    for other in others:
        pools.merge(other)
    batches, samples = (int(sum(vector[i] for vector in vectors)) for i in (0, 1))
    if batches == 0:
        raise CalibrationError(
            "there is no batch in batches=",
            help="an iterator can be read only once: give the DataLoader or the list itself",
        )
    return Pass(list(pools), batches, samples)
