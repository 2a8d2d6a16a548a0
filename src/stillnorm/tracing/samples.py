r"""Mean and variance of a norm's input: of each sample, over its positions; of the whole batch.

For sample i and channel c, over the S positions x_1 .. x_S:

    m = Σ x / S            in the input's precision, float32 at least
    d = x - m              exact where x and m are close, however large they are (Sterbenz)
    r = Σ d / S            what rounding left in m
    mean = m + r           var = Σ d² / S - r²

That is the corrected two-pass algorithm. In float32 the variance is right to 3e-7 whatever
\|mean\| / sigma is, at half the cost of a train-mode batch norm.

Source: Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance", equation 1.7.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements worked on at a time: 1 MiB of float32 stays in a core's cache.
_CHUNK = 2**18

# How far from the mean, squared and in variances, values may be centred: what rounding leaves in
# the variance grows by that part.
_FAR = 0.1


def sample_moments(x: Tensor) -> Tensor:
    """Return m, r and var of each sample and channel, stacked, on the device of x.

    Nothing is moved or waited for, so that a device's queue stays full; `read` does that later.

    Shape:
        - x: ``(N, C, *)``; output: ``(3, N, C)``, in float32 or x's own wider dtype.

    Cost:
        Three reads and two writes of x, a chunk at a time.
    """
    x = x.detach()
    x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)  # (N, C, S)
    if x.shape[2] == 1:
        m = x[:, :, 0].to(torch.promote_types(x.dtype, torch.float32))
        return torch.stack((m, torch.zeros_like(m), torch.zeros_like(m)))
    rows = max(1, _CHUNK // max(1, x.shape[1] * x.shape[2]))
    return torch.cat([_sample_moments(part) for part in torch.split(x, rows)], dim=1)


def _sample_moments(x: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # (n, C, S)
    m = x.mean(2, keepdim=True)  # (n, C, 1)
    d = x - m
    r = d.mean(2, keepdim=True)
    var = (d.square_().mean(2, keepdim=True) - r * r).clamp_min(0)
    return torch.cat((m, r, var), dim=2).permute(2, 0, 1)


def largest_half(x: Tensor) -> Tensor | None:
    """Return the largest magnitude in a float16 input, NaN where there is one, not waited for.

    None for other dtypes, whose range nothing but a fault reaches, and for no values.

    Cost:
        One read of x.
    """
    if x.dtype != torch.float16 or x.numel() == 0:
        return None
    low, high = torch.aminmax(x.detach())
    return torch.maximum(-low, high)


def batch_moments(x: Tensor) -> Tensor:
    """Return m, r and var of each channel over the batch, stacked; as `sample_moments`.

    m need not be the mean, for r holds the difference: that of the first chunk will do, unless it
    is far off.

    Shape:
        - x: ``(N, C, *)``, not empty; output: ``(3, 1, C)``.

    Cost:
        One read of x, and in cache three more reads and two writes, a chunk at a time; on devices
        other than the CPU, and where the first chunk is unlike the rest, one read more.
    """
    x = _pieces(x.detach())
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.numel() <= _CHUNK or x.device.type != "cpu":
        return _around(x, x.mean((0, 2), dtype=wide)).unsqueeze(1)
    # Another device would have to be waited for to know whether the first chunk is far off.
    around = _around(x, x[: max(1, _CHUNK * len(x) // x.numel())].mean((0, 2), dtype=wide))
    if (around[1].square() > _FAR * around[2]).any():
        around = _around(x, around[0] + around[1])
    return around.unsqueeze(1)


def _around(x: Tensor, m: Tensor) -> Tensor:
    """Return m, r and var of the pieces x, (P, C, K), for any m near their mean, (3, C)."""
    sums = [(d.sum(2), d.square_().sum(2)) for d in _deviations(x, m[:, None])]
    if len(sums) == 1:
        r, square = sums[0][0].mean(0), sums[0][1].mean(0)
    else:
        r, square = (torch.cat(parts).mean(0) for parts in zip(*sums, strict=True))
    r, square = r / x.shape[2], square / x.shape[2]
    return torch.stack((m, r, square.addcmul_(r, r, value=-1).clamp_min_(0)))


def _pieces(x: Tensor) -> Tensor:
    """View x as P pieces of K positions, (P, C, K): the samples, or rows of large ones.

    Pieces lie one after another in memory, so that each thread sums what it has written itself.
    """
    n, c = x.shape[:2]
    if x.numel() == n * c:
        return x.reshape(n, c).T.unsqueeze(0)
    if 2 * x.numel() > n * _CHUNK and (rows := x.movedim(1, -1)).is_contiguous():
        return rows.flatten(0, -3).transpose(1, 2)
    return x.flatten(2)


def _deviations(x: Tensor, m: Tensor) -> Iterator[Tensor]:
    """Yield x - m, a chunk at a time, each in the memory of the one before."""
    if x.numel() <= _CHUNK:
        yield x - m
        return
    chunks = torch.split(x, max(1, _CHUNK * len(x) // x.numel()))
    memory = torch.empty_like(chunks[0], dtype=m.dtype)
    for chunk in chunks:
        yield torch.sub(chunk, m, out=memory[: len(chunk)])


def read(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the biased variance of each sample, (N, C), float64 on the CPU.

    Example:
        >>> mean, var = read(sample_moments(torch.tensor([[[1e8, 1e8 + 16.0]]])))
        >>> mean.item(), var.item()
        (100000008.0, 64.0)
    """
    m, r, var = moments.cpu().double()
    return m + r, var
