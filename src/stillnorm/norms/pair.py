"""What a folding convolution and the held norm after it have in common: one object, by identity.

Copies and pickles of a model keep such identities, so that the copy of the convolution goes with
the copy of the norm. Neither knows the other: there is no link to go stale.
"""

from __future__ import annotations

from torch import nn


class Pair:
    """The mark of convolutions and norms that may be computed together."""

    def __repr__(self) -> str:
        return "Pair()"


PAIR = "_stillnorm_pair"


def pair_of(module: nn.Module) -> Pair | None:
    """Return the pair that a folding convolution belongs to, or None."""
    pair = module.__dict__.get(PAIR)
    return pair if isinstance(pair, Pair) else None
