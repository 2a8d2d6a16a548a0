r"""Do batches differ more than their samples explain, and how: in groups, or in order?

At each norm layer every sample :math:`i` of batch :math:`b(i)` is a row :math:`z_i`, once of its
channels' means, in deviations, and once of half the relative differences of its variances. The rows
come from the eval flow, where no sample sees another. With the mean square *between* the B batches
and that *within* them,

.. math:: F = \frac{\frac{1}{B-1} \sum_b n_b \lVert \bar z_b - \bar z \rVert^2}
                   {\frac{1}{n-B} \sum_i \lVert z_i - \bar z_{b(i)} \rVert^2}

is 1 where batches are drawn at random, whatever the samples look like. The **size** is that part of
the batches' scatter which sampling does not explain, root mean square over channels:
:math:`\sqrt{(MS_{between} - MS_{within}) / \bar n}`. The **permutation test** deals the samples
anew to the batches: how often does any of all these rows then differ as much, beside its own mean
and deviation over the deals, as the one that differs most?

Batches are in **groups** where, joined nearest first, they form sets of two or more that take
turns, with a twentieth of the squared difference left inside, sampling aside. All else is
**order**: sorted, drifting, or every batch from a source of its own.

Source: the distance-based F of Anderson 2001, "A new method for non-parametric multivariate
analysis of variance".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Literal

import torch
from torch import Tensor

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.measures.measure import ENOUGH_SAMPLES, SIGNIFICANT, Samples
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table

SHOWN = 3  # layers in a table
DEALS = 999
AT_ONCE = 200  # deals computed together
MOST_SAMPLES = 256
ENOUGH_BATCHES = 4  # with three, two groups of two are out of reach

# Measured by benchmarks/data_rules.py. Half of what SN105 calls far.
MATTERS = 0.15

LEFT = 0.05  # of the mean squared difference between groups, inside them


Groups = tuple[tuple[int, ...], ...]  # batches by number


@dataclass(frozen=True)
class Dispersion:
    """How batches differ, where they differ most beside chance.

    Args:
        block: Which block of rows that is.
        sizes: For each block, what sampling does not explain of the batches' scatter.
        ratio: The mean square between batches, beside that within; 1 for batches drawn at random.
        p: How often samples dealt at random differ as much in any block.
        groups: The batches that are alike, by number; one group where they are not in groups.
        neighbours: The mean squared difference of successive batches, beside that of all pairs.
    """

    block: int
    sizes: tuple[float, ...]
    ratio: float
    p: float
    groups: Groups
    neighbours: float

    @property
    def size(self) -> float:
        """The size where they differ most."""
        return self.sizes[self.block]

    @property
    def is_real(self) -> bool:
        """Whether it is beyond chance and large enough to matter."""
        return self.p < SIGNIFICANT and self.size > MATTERS

    @property
    def pattern(self) -> Literal["groups", "order"]:
        """What kind of difference it is."""
        return "groups" if len(self.groups) > 1 else "order"


@dataclass(frozen=True)
class Batches:
    """How the batches given to `check` differ.

    Args:
        all: What was measured.
        layers: The layers that batches matter to, with the size at each; first the one that differs
            most beside chance.
    """

    all: Dispersion
    layers: tuple[tuple[NormLayer, float], ...]

    @property
    def telling(self) -> tuple[NormLayer, ...]:
        """The layers where the difference matters; the first one at least."""
        return tuple(
            layer for i, (layer, size) in enumerate(self.layers) if not i or size > MATTERS
        )

    @property
    def table(self) -> Table:
        """The layers that show it most."""
        rows = [(layer.path or "(root)", f"{size:.2f} sigma") for layer, size in self.layers]
        return Table(("", "batches apart by"), tuple(rows[:SHOWN]), "lr", gap=3)


def batches_of(evidence: Evidence) -> Batches | None:
    """Measure how the batches given differ at the layers that normalise by them in training.

    Returns:
        None where there is no such layer: nothing then depends on what batches are made of.

    Raises:
        CannotTell: There are fewer than 4 batches, 32 samples, or 2 samples in a batch; or no layer
            receives one row for each sample.
    """
    sizes = evidence.measured.batch_sizes
    layers = [
        layer
        for layer in evidence.layers
        if layer.family == "batch" and evidence.trains_by_batch(layer) and evidence.calls(layer)
    ]
    if not layers:
        return None
    if len(sizes) < ENOUGH_BATCHES or min(sizes) < 2 or sum(sizes) < ENOUGH_SAMPLES:
        raise CannotTell(f"needs {ENOUGH_BATCHES} batches of at least 2, {ENOUGH_SAMPLES} samples")
    blocks: list[Tensor] = []
    owners: list[NormLayer] = []
    for layer in layers:
        seen = evidence.samples(layer, "eval")
        if seen is not None and seen.finite and len(seen) == sum(sizes):
            blocks += blocks_of(seen, layer.eps)
            owners += [layer, layer]
    if not blocks:
        raise CannotTell("no norm layer receives one row for each sample")
    found = dispersion(blocks, sizes)
    by_layer = dict.fromkeys(owners, 0.0)
    for layer, size in zip(owners, found.sizes, strict=True):
        by_layer[layer] = max(by_layer[layer], size)
    most = owners[found.block]
    in_order = sorted(by_layer.items(), key=lambda item: (item[0] is not most, -item[1]))
    return Batches(found, tuple(in_order))


def blocks_of(samples: Samples, eps: float) -> tuple[Tensor, Tensor]:
    """Return one layer's rows: of means, and of variances.

    Shape:
        - outputs: ``(n, C)``, divided by the root of C
    """
    mean, var = samples.pooled
    d = (samples.mean - mean) / (var + eps).sqrt()
    q = (samples.shares() - var) / (var + eps) / 2
    root = math.sqrt(samples.mean.shape[1])
    return d / root, q / root


def dispersion(blocks: Sequence[Tensor], sizes: Sequence[int]) -> Dispersion:
    """Measure how batches differ.

    Args:
        blocks: Rows, one for each sample, batch after batch.
        sizes: Samples in each batch, at least two.

    Shape:
        - blocks: ``(n, D)`` each, with a D of its own

    Cost:
        :math:`n^2 B` times 999 for each block, with n up to 256; nothing where no size matters.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(64, 8, generator=g, dtype=torch.float64)
        >>> dispersion([x], [16] * 4).is_real
        False
        >>> shift = torch.tensor([0.0, 2.0, 0.0, 2.0]).repeat_interleave(16).unsqueeze(1)
        >>> dispersion([x + shift], [16] * 4).groups
        ((0, 2), (1, 3))
    """
    seen = [_scatter(rows, sizes) for rows in blocks]
    most, p = _test(seen) if max(one.size for one in seen) > MATTERS else (0, 1.0)
    apart = seen[most].apart()
    b = len(sizes)
    typical = sum(float(apart[pair]) for pair in combinations(range(b), 2)) / (b * (b - 1) / 2)
    successive = sum(float(apart[pair]) for pair in pairwise(range(b))) / (b - 1)
    return Dispersion(
        block=most,
        sizes=tuple(one.size for one in seen),
        ratio=seen[most].between / seen[most].within if seen[most].within else 1.0,
        p=p,
        groups=_groups(apart, float(seen[most].noise.mean())),
        neighbours=successive / typical if typical > 0 else 1.0,
    )


@dataclass(frozen=True, eq=False)
class _Scatter:
    """Mean squares of some rows.

    Args:
        rows: The rows, around their mean, (n, D).
        member: Which batch each belongs to, one-hot, (n, B).
        means: The batches' means, (B, D).
        between: The mean square between batches.
        within: The mean square within them.
    """

    rows: Tensor
    member: Tensor
    means: Tensor
    between: float
    within: float

    @property
    def counts(self) -> Tensor:
        """Rows in each batch, (B,)."""
        return self.member.sum(0)

    @property
    def size(self) -> float:
        """What sampling does not explain of the batches' scatter."""
        n, b = self.member.shape
        typical = (n - float(self.counts.square().sum()) / n) / (b - 1)
        return math.sqrt(max(self.between - self.within, 0) / typical)

    @property
    def noise(self) -> Tensor:
        """What sampling adds to the squared difference of two batches, (B, B)."""
        part = 1 / self.counts
        return self.within * (part.unsqueeze(0) + part.unsqueeze(1))

    def apart(self) -> Tensor:
        """Return the squared differences of batches without it, (B, B)."""
        squared = (self.means.unsqueeze(0) - self.means.unsqueeze(1)).square().sum(2)
        return (squared - self.noise).fill_diagonal_(0)


def _scatter(rows: Tensor, sizes: Sequence[int]) -> _Scatter:
    """Measure the rows: of large batches the first ones."""
    most = max(2, MOST_SAMPLES // len(sizes))
    parts = [part[:most] for part in torch.split(rows, list(sizes))]
    z = torch.cat(parts)
    z = z - z.mean(0)
    n, b = len(z), len(parts)
    batch = torch.arange(b).repeat_interleave(torch.tensor([len(part) for part in parts]))
    member = torch.nn.functional.one_hot(batch, b).to(z)
    counts = member.sum(0)
    means = (member.T @ z) / counts.unsqueeze(1)
    between = float((counts * means.square().sum(1)).sum())
    within = max(float(z.square().sum()) - between, 0.0)
    return _Scatter(z, member, means, between / (b - 1), within / (n - b))


def _test(seen: Sequence[_Scatter]) -> tuple[int, float]:
    """Return which block differs most beside chance, and how often chance does as much."""
    member = seen[0].member.float()
    n, b = member.shape
    counts = member.sum(0)
    grams = [(one.rows @ one.rows.T).float() for one in seen]
    generator = torch.Generator().manual_seed(n)
    squares = []  # of the batches' means, for the batches as they are and for every deal
    for start in range(0, DEALS + 1, AT_ONCE):
        order = torch.rand(min(AT_ONCE, DEALS + 1 - start), n, generator=generator).argsort(1)
        if start == 0:
            order[0] = torch.arange(n)
        dealt = member[order].transpose(0, 1).reshape(n, -1)  # (n, deals * B)
        sums = torch.stack([(dealt * (gram @ dealt)).sum(0) for gram in grams])
        squares.append((sums.view(len(seen), -1, b) / counts).sum(2))
    t = torch.cat(squares, 1).double()  # (blocks, 1 + DEALS)
    t = (t - t.mean(1, keepdim=True)) / t.std(1, keepdim=True).clamp_min(torch.finfo(t.dtype).tiny)
    most = int(t[:, 0].argmax())
    reached = int((t.amax(0) >= t[most, 0] - 1e-4).sum())
    return most, reached / (1 + DEALS)


def _groups(apart: Tensor, noise: float) -> Groups:
    """Return the groups that batches fall into, as few as explain them; one where they do not."""
    b = len(apart)
    of = list(range(b))  # the group of each batch
    partitions: list[Groups] = []
    for i, j in sorted(combinations(range(b), 2), key=lambda pair: float(apart[pair])):
        if of[i] != of[j]:
            of = [of[i] if group == of[j] else group for group in of]
            partitions.append(
                tuple(tuple(k for k in range(b) if of[k] == g) for g in dict.fromkeys(of))
            )
    one, *several = reversed(partitions)
    return next((groups for groups in several if _explain(groups, apart, noise)), one)


def _explain(groups: Groups, apart: Tensor, noise: float) -> bool:
    """Tell whether groups take turns and leave nothing inside them."""
    number = {batch: i for i, group in enumerate(groups) for batch in group}
    in_time = [number[batch] for batch in sorted(number)]
    turns = 1 + sum(a != b for a, b in pairwise(in_time))
    if min(map(len, groups)) < 2 or turns <= len(groups):
        return False
    inside = [float(apart[pair]) for group in groups for pair in combinations(group, 2)]
    outside = [
        float(apart[i, j]) for one, other in combinations(groups, 2) for i in one for j in other
    ]
    left = sum(inside) / len(inside)
    return left < LEFT * sum(outside) / len(outside) + noise / 2
