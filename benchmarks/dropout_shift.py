"""What a dropout before a norm costs: the measurement behind SN205's threshold.

    python benchmarks/dropout_shift.py [seeds]

A network of four layers learns a smooth function of eight inputs, or scikit-learn's digits, with a
dropout before each of its last two norms. Printed per width and dropout: the largest shift that
SN205 measures, and the error of eval mode on held-out data, with the statistics of training and
with statistics that `recalibrate` has estimated without dropout.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import stillnorm as sn
from stillnorm.diagnosis.evidence.structure import Structure
from stillnorm.norms import probe_modes

STEPS = 1000


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


def trained(x: Tensor, y: Tensor, width: int, p: float) -> nn.Sequential:
    """Train with dropouts of probability p."""
    layers: list[nn.Module] = []
    features = x.shape[1]
    for i in range(3):
        dropout = [nn.Dropout(p)] if i else []
        layers += [*dropout, nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    net = nn.Sequential(*layers, nn.Linear(width, 10 if y.dtype == torch.long else y.shape[1]))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    loss = F.cross_entropy if y.dtype == torch.long else F.mse_loss
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / STEPS)
        part = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        loss(net(x[part]), y[part]).backward()
        optimizer.step()
    return net.eval()


def error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the mean square error, or wrong answers in %."""
    with torch.no_grad():
        out = net(x)
    if y.dtype == torch.long:
        return 100 * float((out.argmax(1) != y).float().mean())
    return float(F.mse_loss(out, y))


def row(x: Tensor, y: Tensor, width: int, p: float, seed: int) -> tuple[float, float, float]:
    """Return the largest shift and the error of eval mode, before and after recalibration."""
    torch.manual_seed(seed)
    known = len(x) * 4 // 5
    net = trained(x[:known], y[:known], width, p)
    structure = Structure(net, x[:256], None, probe_modes(net).in_train)
    shift = max(seen.ratio for seen in structure.shifts)
    before = error(net, x[known:], y[known:])
    sn.recalibrate(net, x[:known].split(256))
    return shift, before, error(net, x[known:], y[known:])


if __name__ == "__main__":
    torch.set_num_threads(1)
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print("width    p   shift   square error: as is, recalibrated   shift   wrong digits: the same")
    for width in (16, 64, 256):
        for p in (0.05, 0.1, 0.2, 0.3, 0.5):
            cells = []
            for data in (regression(), classification()):
                rows = torch.tensor([row(*data, width, p, seed) for seed in range(seeds)])
                cells += rows.mean(0).tolist()
            print(
                f"{width:>5} {p:>4} {cells[0]:>7.2f} {cells[1]:>21.4f} {cells[2]:>13.4f} "
                f"{cells[3]:>7.2f} {cells[4]:>12.2f} % {cells[5]:>7.2f} %",
                flush=True,
            )
