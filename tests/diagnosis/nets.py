"""Small networks and data for the tests of rules, and what is asked of reports."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from stillnorm.diagnosis import Report

Net = TypeVar("Net", bound=nn.Module)


def data(n: int = 64, seed: int = 1, channels: int = 3) -> Tensor:
    """Images, (n, channels, 8, 8), each with its own brightness and contrast."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, 8, 8, generator=g)
    contrast = 0.5 + torch.rand(n, 1, 1, 1, generator=g)
    return contrast * x + 0.3 * torch.randn(n, channels, 1, 1, generator=g)


def batches(n: int = 64, size: int = 16, seed: int = 1) -> list[Tensor]:
    return list(data(n, seed).split(size))


def conv_net(**norm: object) -> nn.Sequential:
    """Two conv-norm-relu blocks, global pooling, a linear head: norms at "1" and "4"."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8, **norm),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8, **norm),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def estimated(net: Net, inputs: Tensor | None = None) -> Net:
    """Give a network affine parameters as if trained and torch's own cumulative statistics."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    g = torch.Generator().manual_seed(0)
    inputs = data(seed=7) if inputs is None else inputs
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            if norm.weight is not None:
                norm.weight.copy_(0.7 + 0.6 * torch.rand(norm.weight.shape, generator=g))
            if norm.bias is not None:
                norm.bias.copy_(0.2 * torch.randn(norm.bias.shape, generator=g))
            norm.momentum = None
            norm.num_batches_tracked.zero_()
        net.train()
        for batch in inputs.split(32):
            net(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net


def found(report: Report) -> dict[str, tuple[str, ...]]:
    """The layers of each finding that is not a mere remark, by code."""
    assert not report.crashed, report.crashed
    return {f.code: f.paths for f in report.findings if f.severity != "info"}
