r"""What a batch norm and a kernel are called in Keras and in torch: the formulas, on numbers alone.

Keras updates its moving statistics by :math:`\mu \leftarrow m \mu + (1 - m) \bar x`, torch by
:math:`\mu \leftarrow (1 - m) \mu + m \bar x`: Keras' momentum is the share of the old value,
torch's that of the new batch. Both normalise a batch of n values by its biased variance, a mean
of squares over n. Keras keeps that one, torch the unbiased one, over n - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def unbiased(variance: Tensor, n: int) -> Tensor:
    r"""Return :math:`\sigma^2 n / (n - 1)`, torch's running variance, of the biased one.

    Example:
        >>> unbiased(torch.tensor([3.0]), 4)
        tensor([4.])
    """
    return (variance.double() * n / (n - 1)).to(variance.dtype)


def biased(variance: Tensor, n: int) -> Tensor:
    r"""Return :math:`\sigma^2 (n - 1) / n`, Keras' moving variance, of the unbiased one.

    Example:
        >>> biased(torch.tensor([4.0]), 4)
        tensor([3.])
    """
    return (variance.double() * (n - 1) / n).to(variance.dtype)


# ------------------------------------------------------------------------------- kernels


def kernel_to_torch(kernel: Tensor) -> Tensor:
    """Put the two channel axes first: (*k, A, B) becomes (B, A, *k).

    That is so for convolutions, (*k, in, out); for transposed ones, (*k, out, in), which torch
    keeps as (in, out, *k); and for dense layers, (in, out).

    Example:
        >>> kernel_to_torch(torch.zeros(3, 5, 16, 32)).shape
        torch.Size([32, 16, 3, 5])
    """
    return kernel.permute(-1, -2, *range(kernel.ndim - 2))


def kernel_to_keras(weight: Tensor) -> Tensor:
    """Do the inverse of `kernel_to_torch`.

    Example:
        >>> kernel_to_keras(torch.zeros(32, 16, 3, 5)).shape
        torch.Size([3, 5, 16, 32])
    """
    return weight.permute(*range(2, weight.ndim), 1, 0)


def depthwise_to_torch(kernel: Tensor) -> Tensor:
    """Make (*k, C, M), M filters on each of C channels, the (C * M, 1, *k) of torch's groups.

    Example:
        >>> depthwise_to_torch(torch.zeros(3, 5, 16, 2)).shape
        torch.Size([32, 1, 3, 5])
    """
    c, m = kernel.shape[-2:]
    spatial = range(kernel.ndim - 2)
    return kernel.permute(-2, -1, *spatial).reshape(c * m, 1, *kernel.shape[:-2])


def depthwise_to_keras(weight: Tensor, channels: int) -> Tensor:
    """Do the inverse of `depthwise_to_torch`.

    Example:
        >>> depthwise_to_keras(torch.zeros(32, 1, 3, 5), 16).shape
        torch.Size([3, 5, 16, 2])
    """
    split = weight.reshape(channels, -1, *weight.shape[2:])
    return split.permute(*range(2, split.ndim), 0, 1)


# ------------------------------------------------------------------------------- flattened maps


def flat_order(shape: Sequence[int], *, moved: bool, channels_first: bool) -> Tensor:
    """Return where Keras has each feature of a flattened map, in torch's order.

    Torch flattens (C, *k). What `order` this gives of a Keras array `values` is
    ``values[order]``, and back ``values[order.argsort()]``.

    Args:
        shape: The map's shape in Keras, without the batch.
        moved: Whether its first axis is moved last before, by Flatten(data_format=).
        channels_first: Whether C is the first axis there, and not the last.

    Example:
        >>> flat_order((3, 2), moved=False, channels_first=False)
        tensor([0, 2, 4, 1, 3, 5])
    """
    index = torch.arange(math.prod(shape))
    if moved:
        index = index.reshape(*shape[1:], shape[0]).movedim(-1, 0)
    index = index.reshape(*shape)
    return (index if channels_first else index.movedim(-1, 0)).reshape(-1)
