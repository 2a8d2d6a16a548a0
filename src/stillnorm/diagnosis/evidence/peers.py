"""What the other ranks of a process group hold: every rank's running statistics, gathered once.

It is done before anything that can fail on one rank alone, so that none waits for another in vain.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stillnorm.averages import pool_statistics
from stillnorm.calibration.ranks import Group, Ranks
from stillnorm.errors import CalibrationError
from stillnorm.norms import NormLayer, find_norms
from stillnorm.state.record import dotted

_DIGITS = 12  # hexadecimal: float64 holds 48 bits as they are


@dataclass(frozen=True, eq=False)
class Peers:
    """The running statistics of all ranks.

    Args:
        size: The number of ranks.
        means: By path, the running mean of each rank.
        variances: By path, the running variance of each.
        reason: Why there are none to compare; empty where there are.

    Shape:
        - means, variances: ``(ranks, C)``, float64, on the CPU
    """

    size: int
    means: dict[str, Tensor] = field(default_factory=dict)
    variances: dict[str, Tensor] = field(default_factory=dict)
    reason: str = ""

    def pooled(self, layer: NormLayer) -> tuple[Tensor, Tensor]:
        """Return the moments of all ranks' values together, each rank counting the same."""
        means, variances = self.means[layer.path], self.variances[layer.path]
        if layer.family == "instance":  # its variance is one within samples: no spread between
            return means.mean(0), variances.mean(0)
        mean, var = dotted(layer.path, "running_mean"), dotted(layer.path, "running_var")
        pooled = pool_statistics(
            {mean: m, var: v} for m, v in zip(means.clone(), variances.clone(), strict=True)
        )
        return pooled[mean], pooled[var]


def gather(model: nn.Module, group: Group) -> Peers | None:
    """Gather the statistics of all ranks of a group; every rank has to call this.

    Returns:
        The same on every rank; None where there is one rank only.

    Raises:
        CalibrationError: There is no such group.
    """
    device = next((t.device for t in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    ranks = Ranks(group, device)
    if ranks.size == 1:
        return None
    layers: list[NormLayer] = []

    def signature() -> Tensor:
        layers.extend(filter(_has_values, find_norms(model)))
        said = ";".join(f"{layer.path} {_length(layer)}" for layer in layers)
        digest = hashlib.sha256(said.encode()).hexdigest()
        parts = (digest[i : i + _DIGITS] for i in range(0, 4 * _DIGITS, _DIGITS))
        return torch.tensor([int(part, 16) for part in parts], dtype=torch.float64)

    try:
        first, *others = ranks.gathered(signature, 4)
        if not all(torch.equal(first, other) for other in others):
            return Peers(ranks.size, reason="the ranks hold models with different norm layers")
        length = 2 * sum(map(_length, layers))
        gathered = torch.stack(ranks.gathered(lambda: _statistics(layers), length))
    except CalibrationError as error:
        return Peers(ranks.size, reason=error.fact)
    parts = iter(torch.split(gathered, [_length(x) for x in layers for _ in range(2)], dim=1))
    both = {layer.path: (next(parts), next(parts)) for layer in layers}
    return Peers(
        ranks.size,
        means={path: mean for path, (mean, _) in both.items()},
        variances={path: var for path, (_, var) in both.items()},
    )


def _has_values(layer: NormLayer) -> bool:
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None or layer.is_lazy:
        return False
    return not (mean.is_meta or var.is_meta) and mean.shape == var.shape


def _length(layer: NormLayer) -> int:
    return 0 if layer.running_mean is None else layer.running_mean.numel()


def _statistics(layers: list[NormLayer]) -> Tensor:
    both = [t for layer in layers for t in (layer.running_mean, layer.running_var) if t is not None]
    flat = [tensor.detach().flatten().to("cpu", torch.float64) for tensor in both]
    return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float64)
