r"""Is a difference real, and how large is it? Two pure functions whose unit is the sample.

Every sample :math:`i` contributes one vector :math:`d_i \in \mathbb{R}^C`: by how much it alone
says that a layer's statistics are off, per channel. Positions of one image are not independent, so
a sample counts once however large its map is.

The **effect** is the size of :math:`E[d]` per channel, estimated without bias by leaving out the
products of a sample with itself, which hold nothing but noise:

.. math:: U = \frac{1}{n(n-1)C} \sum_{i \ne j} \langle d_i, d_j \rangle
            = \frac{\lVert \sum_i d_i \rVert^2 - \sum_i \lVert d_i \rVert^2}{n(n-1)C},
          \qquad \text{effect} = \sqrt{\max(U, 0)}

so that a perfect layer has effect 0 and not :math:`\sigma/\sqrt{n}`, whatever :math:`n` is.

The **sign-flip test** asks how often noise alone would reach that size: if :math:`E[d] = 0` then
:math:`d_i` and :math:`-d_i` are equally likely, so with random signs :math:`s`
:math:`\lVert \sum_i s_i d_i \rVert^2 = s^\top G s` with the Gram matrix
:math:`G_{ij} = \langle d_i, d_j \rangle` has the distribution that the observed value came from.

Source: sign randomisation as in Edgington & Onghena, "Randomization Tests", 2007; the U-statistic
is the unbiased estimate of Gretton et al. 2012 ("A Kernel Two-Sample Test") with a linear kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXACT_UP_TO = 11  # samples: 2**10 sign patterns (a pattern and its negative count once)
FLIPS = 1999
MAX_SAMPLES = 256  # more samples add power that no decision here needs, at quadratic cost


def effect(d: Tensor) -> float:
    """The unbiased size of the mean of ``d`` per channel (see the module's formula).

    Args:
        d: one row per sample.

    Returns:
        The effect, at least 0, in the unit of ``d``; 0 when there are fewer than two samples.

    Shape:
        - d: ``(n, C)``

    Example:
        >>> effect(torch.full((8, 3), 0.5, dtype=torch.float64))
        0.5
    """
    n, channels = d.shape
    if n < 2 or channels == 0:
        return 0.0
    total = d.sum(0).square().sum()  # |sum_i d_i|^2
    own = d.square().sum()  # sum_i |d_i|^2
    u = (total - own) / (n * (n - 1) * channels)
    return float(u.clamp_min(0).sqrt())


def sign_flip_p(d: Tensor) -> float:
    """How often random signs reach the observed size: the p-value of "the mean of ``d`` is zero".

    Exact up to 11 samples; beyond, 1999 draws from a generator of its own, so that the answer is
    the same every time and the global generator is not touched. More than 256 samples are thinned
    evenly.

    Shape:
        - d: ``(n, C)``

    Example:
        >>> sign_flip_p(torch.ones(3, 1))       # 2 of 8 patterns are as extreme: all + and all -
        0.25
    """
    n = len(d)
    if n > MAX_SAMPLES:
        d = d[torch.linspace(0, n - 1, MAX_SAMPLES).round().long()]
        n = MAX_SAMPLES
    if n < 2:
        return 1.0
    gram = d @ d.T  # (n, n)
    observed = gram.sum()
    signs = _signs(n).to(gram)  # (patterns, n)
    flipped = ((signs @ gram) * signs).sum(1)
    reached = int((flipped >= observed - 1e-9 * observed.abs()).sum())
    if n <= EXACT_UP_TO:
        return reached / len(signs)
    return (1 + reached) / (1 + len(signs))


def _signs(n: int) -> Tensor:
    """All sign patterns with the last sign fixed, or random ones when there are too many."""
    if n <= EXACT_UP_TO:
        numbers = torch.arange(2 ** (n - 1), device="cpu")  # whatever the default device is
        bits = numbers.unsqueeze(1) >> torch.arange(n, device="cpu") & 1
        return 1 - 2 * bits
    generator = torch.Generator().manual_seed(n)
    return 1 - 2 * torch.randint(0, 2, (FLIPS, n), generator=generator, device="cpu")
