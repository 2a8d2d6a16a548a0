"""What noisy batch statistics cost: the measurement behind SN207's and the verdict's thresholds.

    python benchmarks/small_batches.py [seeds]

A small convolutional network learns scikit-learn's digits. The optimizer's batch is always 64;
what is normalised together is 64, 32, ... 2 samples (gradient accumulation). Printed per size: the
noise that SN207 predicts for the trained network, largest layer and root mean square over layers,
and the accuracy on held-out digits in eval mode.
"""

from __future__ import annotations

import math
import sys

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.request import Request
from stillnorm.diagnosis.evidence.runs import run_flows

EPOCHS = 6


def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return x[:1200], y[:1200], x[1200:], y[1200:]


def network() -> nn.Module:
    def block(inside: int, outside: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        return [conv, nn.BatchNorm2d(outside), nn.ReLU()]

    return nn.Sequential(
        *block(1, 16, 1),
        *block(16, 32, 2),
        *block(32, 32, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 32, bias=False),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


def trained(size: int, seed: int, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    net = network().train()
    # As many batches are averaged as at 64, so that only the noise of training differs.
    for norm in net.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.momentum = 1 - 0.9 ** (size / 64)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(EPOCHS):
        for step in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            for part in step.split(size):
                if len(part) > 1:
                    loss = F.cross_entropy(net(x[part]), y[part], reduction="sum")
                    (loss / len(step)).backward()
            optimizer.step()
    return net.eval()


if __name__ == "__main__":
    torch.set_num_threads(1)
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    x, y, x_new, y_new = data()
    print("normalised   noise, largest   noise, rms   eval accuracy")
    for size in (64, 32, 16, 8, 4, 2):
        largest, rms, right = 0.0, 0.0, 0.0
        for seed in range(seeds):
            net = trained(size, seed, x, y)
            batches = iter(x_new[:256].split(size))
            request = Request(net, batches)
            seen = Evidence(request, run_flows(request, None))
            noise = [seen.noise(layer) or 0.0 for layer in seen.layers]
            largest += max(noise) / seeds
            rms += math.sqrt(sum(n * n for n in noise) / len(noise)) / seeds
            with torch.no_grad():
                right += float((net(x_new).argmax(1) == y_new).float().mean()) / seeds
        print(f"{size:>10} {largest:>16.2f} {rms:>12.2f} {100 * right:>13.1f} %", flush=True)
