"""A held network wants a smaller learning rate: the measurement behind `freeze`'s docstring.

    python benchmarks/held_learning_rate.py [--seeds 1]

A small ResNet learns scikit-learn's digits at batch size 64, then is fine-tuned at batch size 2 on
digits of other brightness and contrast (the new domain) in four ways at five learning rates:

    not frozen      batch statistics, running statistics updated
    momentum 0      batch statistics, running statistics kept (what thread 000 took for freezing)
    recalibrated    the same, then `sn.recalibrate` on the training data, no weight changed
    held            `sn.freeze`

What is printed is the accuracy in eval mode on held-out digits.
"""

from __future__ import annotations

import argparse
import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import stillnorm as sn

RATES = (0.01, 0.005, 0.002, 0.001, 0.0003)
STEPS = 900


class Block(nn.Module):
    """conv, norm, ReLU, conv, norm, plus the input."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Conv2d(channels_in, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) to (N, channels, H / stride, W / stride)."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet() -> nn.Sequential:
    """Make the net, for (N, 1, 8, 8)."""
    blocks = [Block(1, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def digits() -> tuple[Tensor, Tensor]:
    """Return all digits, (1797, 1, 8, 8) from 0 to 1, and their labels."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


def train(net: nn.Module, x: Tensor, y: Tensor, steps: int, batch: int, rate: float) -> None:
    """Train in train mode with SGD, momentum 0.9."""
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    net.train()
    for _ in range(steps):
        chosen = torch.randint(len(x), (batch,))
        optimizer.zero_grad()
        F.cross_entropy(net(x[chosen]), y[chosen]).backward()
        optimizer.step()


def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the accuracy in eval mode, in percent."""
    with sn.eval_mode(net), torch.no_grad():
        return 100 * float((net(x).argmax(1) == y).float().mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    seeds = parser.parse_args().seeds
    x, y = digits()
    shifted = 0.3 + 0.5 * x
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    fit, held_out = order[:1300], order[1300:]
    rows: dict[float, dict[str, list[float]]] = {rate: {} for rate in RATES}
    before = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        start = resnet()
        train(start, x[fit], y[fit], 400, 64, 0.02)
        # The fine-tuning starts from statistics that fit the new data.
        sn.recalibrate(start, list(shifted[fit].split(64)))
        before.append(accuracy(start, shifted[held_out], y[held_out]))
        for rate in RATES:
            for way in ("not frozen", "momentum 0", "held"):
                torch.manual_seed(100 + seed)
                net = copy.deepcopy(start)
                if way == "held":
                    sn.freeze(net)
                if way == "momentum 0":
                    for norm in net.modules():
                        if isinstance(norm, nn.BatchNorm2d):
                            norm.momentum = 0.0
                train(net, shifted[fit], y[fit], STEPS, 2, rate)
                score = accuracy(net, shifted[held_out], y[held_out])
                rows[rate].setdefault(way, []).append(score)
                if way == "momentum 0":
                    sn.recalibrate(net, list(shifted[fit].split(2)))
                    score = accuracy(net, shifted[held_out], y[held_out])
                    rows[rate].setdefault("recalibrated", []).append(score)
    ways = ("not frozen", "momentum 0", "recalibrated", "held")
    print(f"torch {torch.__version__}, {seeds} seed(s), mean eval accuracy in percent")
    print(f"before the first step: {sum(before) / seeds:.1f}\n")
    print(f"{'lr':>8}" + "".join(f"{way:>15}" for way in ways))
    for rate, row in rows.items():
        print(f"{rate:>8}" + "".join(f"{sum(row[way]) / seeds:>15.1f}" for way in ways))


if __name__ == "__main__":
    main()
