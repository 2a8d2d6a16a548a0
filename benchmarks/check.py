"""What `check` costs, in eval forwards over the same batches.

    python benchmarks/check.py [--networks torchvision/resnet50] [--batches 8 8 8 8] [--size 160]
        [--threads 2] [--rounds 5]

Three states of each network: healthy (recalibrated), one layer off, all statistics initial. The
base is an eval forward without gradients over the batches; in each round base and check take turns.
Printed are medians over the rounds of the ratio of CPU times within one, with the smallest and the
largest.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from contenders import network, norms_of
from torch import Tensor, nn

import stillnorm as sn
from support.zoo import images

NETWORKS = ("torchvision/resnet50", "torchvision/mobilenet_v2")


def forward(net: nn.Module, batches: Sequence[Tensor]) -> None:
    net.eval()
    with torch.no_grad():
        for x in batches:
            net(x)


def seconds(work: Callable[..., object], net: nn.Module, batches: list[Tensor]) -> float:
    """The CPU time of all threads: other processes do not count."""
    gc.collect()
    start = time.process_time()
    work(net, batches)
    return time.process_time() - start


def states(base: nn.Module, batches: Sequence[Tensor]) -> dict[str, nn.Module]:
    """The network healthy, with one layer off, and never estimated."""
    sn.recalibrate(base, list(batches))
    off, initial = copy.deepcopy(base), copy.deepcopy(base)
    layers = list(norms_of(off).values())
    layers[len(layers) // 3].running_mean.add_(3)
    for layer in norms_of(initial).values():
        layer.reset_running_stats()
    return {"healthy": base, "one layer off": off, "initial statistics": initial}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 8, 8, 8])
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"batches of {args.batches}, {args.size} px, {args.threads} threads")
    for name in args.networks:
        whole = images(sum(args.batches), size=args.size, seed=1)
        batches = list(whole.split(args.batches))
        made = network(name, args.size, "cpu", torch.contiguous_format)
        for state, net in states(made, batches).items():
            forward(net, batches)
            ratios = []
            for _ in range(args.rounds):
                base = seconds(forward, net, batches)
                ratios.append(seconds(sn.check, net, batches) / base)
            codes = " ".join(f.code for f in sn.check(net, batches).findings)
            print(
                f"{name:26} {state:19} {statistics.median(ratios):5.2f} forwards "
                f"({min(ratios):.2f} .. {max(ratios):.2f})   {codes}"
            )


if __name__ == "__main__":
    main()
