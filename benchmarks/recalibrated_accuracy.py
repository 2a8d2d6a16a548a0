"""What recalibration gives back: the measurement behind docs/recalibrating.md.

    python benchmarks/recalibrated_accuracy.py [seeds]

Two networks learn scikit-learn's digits: the demo's (thread 001), eight hidden layers of tanh, and
a small residual network. Then something happens to the weights, and the statistics no longer fit.
Printed per situation, mean over seeds of the accuracy on held-out digits in percent: before; after,
by the batch's statistics (batches of 64) and in eval mode; and in eval mode with the statistics
re-estimated on the training set, by both methods and by `torch.optim.swa_utils.update_bn`, at
batches of 64.

The second table is of the trained networks as they are: how far the pooled statistics lie from the
fixed point of eval, in deviations (root mean square over the channels of the worst layer), by the
size of the batches that they come from, and the accuracy with them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.optim.swa_utils import update_bn

import stillnorm as sn
from stillnorm.demo.data import Labelled, digits
from stillnorm.demo.plotted import PlottedNet
from stillnorm.demo.training import measured_accuracy, train

BATCH = 64
EPOCHS = 8
SIZES = (64, 16, 4, 2)


def convolved(inside: int, outside: int, size: int = 3, stride: int = 1) -> nn.Sequential:
    """Return a convolution and its norm."""
    conv = nn.Conv2d(inside, outside, size, stride, size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside))


class Residual(nn.Module):
    """Four residual blocks on 8 x 8 pixels.

    Shape:
        - x: ``(N, 1, 8, 8)``; output: ``(N, 10)``
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolved(1, 16)
        sizes = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1))
        self.first = nn.ModuleList(convolved(a, b, 3, stride) for a, b, stride in sizes)
        self.second = nn.ModuleList(convolved(b, b) for _, b, _ in sizes)
        self.wider = convolved(16, 32, 1, 2)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        x = self.stem(x).relu()
        for first, second in zip(self.first, self.second, strict=True):
            y = second(first(x).relu())
            x = (y + (x if x.shape == y.shape else self.wider(x))).relu()
        return self.head(x.mean((2, 3)))


def trained(
    make: Callable[[], nn.Module], data: Labelled, seed: int
) -> tuple[nn.Module, nn.Module]:
    """Return the network, and the average of its weights over the last half of the epochs."""
    torch.manual_seed(seed)
    net = make()
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    steps = data.shuffled(BATCH, EPOCHS * -(-len(data) // BATCH), seed)
    half = len(steps) // 2
    train(net.train(), data, steps[:half], optimizer)
    average = torch.optim.swa_utils.AveragedModel(net)
    for step in steps[half:]:
        train(net, data, [step], optimizer)
        average.update_parameters(net)
    return net.eval(), average.module.eval()


def layers(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def prune_weights(net: nn.Module) -> None:
    """Set the smallest 30 % of all weights to zero."""
    chosen = [(module, "weight") for module in layers(net)]
    prune.global_unstructured(chosen, prune.L1Unstructured, amount=0.3)
    for module, name in chosen:
        prune.remove(module, name)


def prune_channels(net: nn.Module) -> None:
    """Set 30 % of the output channels of every hidden layer to zero, the smallest."""
    for module in layers(net)[:-1]:
        prune.ln_structured(module, "weight", amount=0.3, n=1, dim=0)
        prune.remove(module, "weight")


def situations(
    net: nn.Module, average: nn.Module
) -> Iterator[tuple[str, nn.Module, Callable[[Labelled], Labelled]]]:
    def same(data: Labelled) -> Labelled:
        return data

    def darker(data: Labelled) -> Labelled:
        return Labelled(data.x.square() * 0.5, data.y)

    for name, change in (("30 % of weights", prune_weights), ("30 % of channels", prune_channels)):
        changed = copy.deepcopy(net)
        change(changed)
        yield f"pruned, {name}", changed, same
    yield "weights averaged", average, same
    yield "another domain", net, darker


def measured(net: nn.Module, data: Labelled, test: Labelled) -> list[float]:
    """Return the accuracies after, in percent; the network stays as it was."""

    def score() -> float:
        return 100 * measured_accuracy(net.eval(), test, len(test))

    def after(repair: Callable[[], object]) -> float:
        with sn.preserved(net):
            repair()
            return score()

    found = [by_batch(net, test)]
    found.append(score())
    batches = [x for x, _ in data.batches(BATCH)]
    found.append(after(lambda: sn.recalibrate(net, batches)))
    found.append(after(lambda: sn.recalibrate(net, batches, method="sequential")))
    found.append(after(lambda: update_bn(batches, net)))
    return found


def by_size(net: nn.Module, data: Labelled, test: Labelled, size: int) -> tuple[float, float]:
    """Return the distance of the pooled statistics from the fixed point, and the accuracy."""
    batches = [x for x, _ in data.batches(size)]
    with sn.preserved(net):
        sn.recalibrate(net, batches)
        score = 100 * measured_accuracy(net.eval(), test, len(test))
        fixed = sn.recalibrate(net, batches, method="sequential")
    return max(layer.mean_moved for layer in fixed.layers), score


def by_batch(net: nn.Module, test: Labelled) -> float:
    with sn.preserved(net), sn.no_updates(net):
        return 100 * measured_accuracy(net.train(), test, BATCH)


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    columns = ("before", "batch", "eval", "pooled", "sequential", "update_bn")
    print(f"{'':38}" + "".join(f"{column:>12}" for column in columns))
    for title, make in (("thread 001", lambda: PlottedNet(0.1)), ("residual", Residual)):
        rows: dict[str, list[list[float]]] = {}
        sizes: list[list[float]] = []
        for seed in range(seeds):
            data, test = digits(seed)
            net, average = trained(make, data, seed)
            for name, changed, domain in situations(net, average):
                before = 100 * measured_accuracy(net, test, len(test))
                row = [before, *measured(changed, domain(data), domain(test))]
                rows.setdefault(name, []).append(row)
            sizes.append([x for size in SIZES for x in by_size(net, data, test, size)])
        for name, found in rows.items():
            mean = torch.tensor(found).mean(0)
            print(f"{title}, {name}".ljust(38) + "".join(f"{x:12.1f}" for x in mean.tolist()))
        shown = torch.tensor(sizes).mean(0).reshape(-1, 2).tolist()
        for size, (distance, score) in zip(SIZES, shown, strict=True):
            print(f"{title}, pooled at {size:3}".ljust(38) + f"{distance:12.3f}{score:12.1f}")


if __name__ == "__main__":
    main()
