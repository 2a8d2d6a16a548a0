"""What a norm on the output costs: the measurement behind SN203's threshold.

    python benchmarks/normalized_output.py [seeds]

A two-layer network learns a smooth function of eight inputs, or scikit-learn's digits as scores,
with and without a BatchNorm on its output. Printed per batch size, which is the number of values
that the norm averages: the error of eval mode on held-out data, with the norm and without. Every
run takes the same number of steps.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

STEPS = 1500


def regression() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3000, 8, generator=g)
    y = torch.stack([x[:, :4].sin().sum(1), (x[:, 4:] ** 2).mean(1)], 1)
    return x, (y - y.mean(0)) / y.std(0)


def classification() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order], y[order]


def error(x: Tensor, y: Tensor, size: int, normalized: bool, seed: int) -> float:
    """Train on four fifths; return the mean square error on the rest, or wrong answers in %."""
    torch.manual_seed(seed)
    scores = y.dtype == torch.long
    outputs = 10 if scores else y.shape[1]
    layers = [nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, outputs)]
    net = nn.Sequential(*layers, *([nn.BatchNorm1d(outputs)] if normalized else []))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    known = len(x) * 4 // 5
    loss = F.cross_entropy if scores else F.mse_loss
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / STEPS)
        part = torch.randint(known, (size,))
        optimizer.zero_grad()
        loss(net(x[part]), y[part]).backward()
        optimizer.step()
    with torch.no_grad():
        out = net.eval()(x[known:])
    if scores:
        return 100 * float((out.argmax(1) != y[known:]).float().mean())
    return float(F.mse_loss(out, y[known:]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print("values   mean square error: norm, none   wrong digits: norm, none")
    for size in (4, 8, 16, 32, 64, 128, 256):
        cells = [
            sum(error(*data, size, normalized, seed) for seed in range(seeds)) / seeds
            for data in (regression(), classification())
            for normalized in (True, False)
        ]
        print(
            f"{size:>6} {cells[0]:>20.4f} {cells[1]:>8.4f} {cells[2]:>16.1f} % {cells[3]:>5.1f} %"
        )
