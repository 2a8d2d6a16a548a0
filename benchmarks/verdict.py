"""Freeze, recalibrate or train on? The verdict of `check` against having tried them all.

    python benchmarks/verdict.py [seeds]

A small network for scikit-learn's digits comes into a situation; `check` sees 128 samples of it, in
batches of the size given, with accuracy as the score and without. Then it is trained on with 4096
samples: by batch statistics (train) or with the running statistics held (freeze), as they are or
after `recalibrate` on the training set; each with the best of three learning rates, for a frozen
network wants a smaller one. Printed are the accuracies on held-out digits in eval mode, mean over
seeds, and how often the verdict named one of the ways that came within two points of the best.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from small_batches import network
from torch import Tensor, nn
from torch.nn.utils import prune

import stillnorm as sn
from stillnorm.demo.data import Labelled, digits
from stillnorm.demo.training import accuracy, measured_accuracy, train
from stillnorm.diagnosis import Verdict

SAMPLES, SEEN, CLOSE = 4096, 128, 0.02
RATES = (0.03, 0.003, 0.0003)
WAYS = ("train", "freeze", "recalibrate, train", "recalibrate, freeze")


@dataclass
class Situation:
    """A network, the data it goes on with, and how these come."""

    net: nn.Module
    train_set: Labelled
    test_set: Labelled
    size: int
    is_pure: bool = False

    def steps(self, n: int, seed: int) -> list[Tensor]:
        """Return the indices of n batches."""
        if not self.is_pure:
            return self.train_set.shuffled(self.size, n, seed)
        of_class = [torch.nonzero(self.train_set.y == k).flatten() for k in range(10)]
        batches = [batch for indices in of_class for batch in indices.split(self.size)]
        g = torch.Generator().manual_seed(seed)
        return [batches[i] for i in torch.randint(len(batches), (n,), generator=g)]


def trained(seed: int, size: int = 64, steps: int = 300, momentum: float = 0.1) -> nn.Module:
    """The network after some steps of training by batch statistics."""
    torch.manual_seed(seed)
    net, (data, _) = network().train(), digits(seed)
    for norm in norms(net):
        norm.momentum = momentum
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    train(net, data, data.shuffled(size, steps, seed), optimizer)
    return net


def norms(net: nn.Module) -> list[nn.Module]:
    return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def changed(data: Labelled, change: Callable[[Tensor], Tensor]) -> Labelled:
    return Labelled(change(data.x), data.y)


def negative(x: Tensor) -> Tensor:
    """Another domain: black on white, and brighter."""
    return 1.5 - 1.2 * x


def pruned(net: nn.Module) -> nn.Module:
    for module in [m for m in net.modules() if isinstance(m, nn.Conv2d)]:
        prune.l1_unstructured(module, "weight", amount=0.5)
        prune.remove(module, "weight")
    return net


def fine_tuned_with_momentum_0(seed: int) -> nn.Module:
    """Thread 000: weights go on, statistics do not."""
    net, (data, _) = trained(seed), digits(seed)
    data = changed(data, negative)
    for norm in norms(net):
        norm.momentum = 0.0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    train(net, data, data.shuffled(16, 150, seed), optimizer)
    for norm in norms(net):
        norm.momentum = 0.1
    return net


def situations(seed: int) -> dict[str, Situation]:
    data = digits(seed)
    other = tuple(changed(part, negative) for part in data)
    return {
        "trained, batches of 64": Situation(trained(seed), *data, 64),
        "trained, batches of 8": Situation(trained(seed), *data, 8),
        "trained, batches of 2": Situation(trained(seed), *data, 2),
        "trained, batches of one class": Situation(trained(seed), *data, 16, is_pure=True),
        "momentum 0.001, batches of 64": Situation(trained(seed, momentum=0.001), *data, 64),
        "momentum 0.001, batches of 2": Situation(trained(seed, momentum=0.001), *data, 2),
        "another domain, batches of 64": Situation(trained(seed), *other, 64),
        "another domain, batches of 2": Situation(trained(seed), *other, 2),
        "half of the weights pruned, of 64": Situation(pruned(trained(seed)), *data, 64),
        "half of the weights pruned, of 4": Situation(pruned(trained(seed)), *data, 4),
        "tuned with momentum 0, of 2": Situation(fine_tuned_with_momentum_0(seed), *other, 2),
        "not trained yet, batches of 64": Situation(trained(seed, steps=0), *data, 64),
    }


def outcome(way: str, here: Situation, seed: int) -> float:
    net = copy.deepcopy(here.net).train()
    if way.startswith("recalibrate"):
        sn.recalibrate(net, [here.train_set.x[i] for i in here.steps(-(-512 // here.size), seed)])
    if way.endswith("freeze"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", sn.errors.StillnormWarning)
            sn.freeze(net, affine="trains")
    return max(tuned(copy.deepcopy(net), here, rate, seed) for rate in RATES)


def tuned(net: nn.Module, here: Situation, rate: float, seed: int) -> float:
    optimizer = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    steps = here.steps(SAMPLES // here.size, seed + 1)
    train(net, here.train_set, [step for step in steps if len(step) > 1], optimizer)
    return measured_accuracy(net.eval(), here.test_set, 64)


def verdicts(here: Situation, seed: int) -> tuple[str, str]:
    """Return what `check` says with a score and without; recalibrating is the way on from there."""
    steps = here.steps(SEEN // here.size, seed)
    batches = [(here.train_set.x[i], here.train_set.y[i]) for i in steps]
    with_score = sn.check(here.net, batches, score=accuracy, max_batches=None)
    without = sn.check(here.net, batches, max_batches=None)
    return said(with_score.verdict), said(without.verdict)


def said(verdict: Verdict) -> str:
    return verdict.choice if verdict.then is None else f"recalibrate, {verdict.then}"


def main() -> None:
    torch.set_num_threads(1)
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{'':31}  train  freeze  recalibrated: train  freeze   verdict with score | without")
    for name in situations(0):
        sums: Counter[str] = Counter()
        answers: tuple[Counter[str], Counter[str]] = Counter(), Counter()
        right = [0, 0]
        for seed in range(seeds):
            here = situations(seed)[name]
            scores = {way: outcome(way, here, seed) for way in WAYS}
            good = {way for way in WAYS if scores[way] >= max(scores.values()) - CLOSE}
            sums.update(scores)
            for i, answer in enumerate(verdicts(here, seed)):
                answers[i][answer] += 1
                right[i] += answer in good
        train, freeze, *recalibrated = (f"{100 * sums[way] / seeds:5.1f}" for way in WAYS)
        shown = (
            f"{' or '.join(found)} ({n} of {seeds})"
            for found, n in zip(answers, right, strict=True)
        )
        after = "   ".join(recalibrated)
        print(f"{name:31}  {train}  {freeze}         {after}   {' | '.join(shown)}", flush=True)


if __name__ == "__main__":
    main()
