"""Re-estimating running statistics: time and exactness beside fvcore and torch's update_bn.

    python benchmarks/recalibrate.py [--networks torchvision/resnet50 timm/efficientnet_b0]
        [--batches 8 8 8 8] [--size 160] [--layouts contiguous channels_last] [--threads 2]
        [--seconds 40]

The base is what none of them can do without: a forward without gradients over the same batches,
with the norms in train mode. In one run, interleaved, all take turns in a rotating order; what is
printed are medians of the ratios within a round to the base, with the quartiles.

Exactness is judged against sums in float64 of what each layer received in that contender's own
flow: the worst channel of all layers. The error of a variance is relative, that of a mean in
deviations.
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
from torch.optim.swa_utils import update_bn

import stillnorm as sn
from support.zoo import images, torchvision

try:
    from fvcore.nn.precise_bn import update_bn_stats
except ImportError:
    update_bn_stats = None

NETWORKS = ("torchvision/mobilenet_v2", "torchvision/resnet50", "torchvision/resnet18")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BASE = "forward"

Batches = Sequence[Tensor]


def with_norms_in_train_mode(net: nn.Module) -> nn.Module:
    net.eval()
    for norm in norms_of(net).values():
        norm.train()
    return net


def forward(net: nn.Module, batches: Batches) -> None:
    with_norms_in_train_mode(net)
    with torch.no_grad():
        for x in batches:
            net(x)


def recalibrate(net: nn.Module, batches: Batches) -> None:
    sn.recalibrate(net, batches)


def fvcore(net: nn.Module, batches: Batches) -> None:
    update_bn_stats(with_norms_in_train_mode(net), batches, num_iters=len(batches))


def torchs(net: nn.Module, batches: Batches) -> None:
    update_bn(batches, net)


CONTENDERS: dict[str, Callable[[nn.Module, Batches], None]] = {
    BASE: forward,
    "stillnorm.recalibrate": recalibrate,
    "fvcore update_bn_stats": fvcore,
    "torch update_bn": torchs,
}
if update_bn_stats is None:
    del CONTENDERS["fvcore update_bn_stats"]


# -------------------------------------------------------------------------------- measuring


class Sums:
    """The sums, in float64, of the values that a layer receives."""

    def __init__(self) -> None:
        self.n, self.x, self.xx = 0, 0.0, 0.0

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add one input; a forward pre-hook."""
        values = args[0].double().movedim(1, 0).flatten(1)
        self.n += values.shape[1]
        self.x += values.sum(1)
        self.xx += values.square().sum(1)

    def errors(self, layer: nn.Module) -> tuple[float, float]:
        """Return the worst errors of the layer's variance and mean."""
        mean = self.x / self.n
        var = (self.xx - self.n * mean.square()) / (self.n - 1)
        off_var = (layer.running_var.double() - var).abs() / var
        off_mean = (layer.running_mean.double() - mean).abs() / var.sqrt()
        return float(off_var.max()), float(off_mean.max())


def errors(name: str, base: nn.Module, batches: Batches) -> tuple[float, float]:
    """Return the worst errors of all layers after one run of a contender."""
    net = copy.deepcopy(base)
    sums = {layer: Sums() for layer in norms_of(net).values()}
    for layer, hook in sums.items():
        layer.register_forward_pre_hook(hook)
    CONTENDERS[name](net, batches)
    var, mean = zip(*(hook.errors(layer) for layer, hook in sums.items()), strict=True)
    return max(var), max(mean)


def seconds(name: str, net: nn.Module, batches: Batches) -> float:
    """Time one run of a contender."""
    start = time.perf_counter()
    CONTENDERS[name](net, batches)
    return time.perf_counter() - start


def times(base: nn.Module, batches: Batches, limit: float) -> dict[str, list[float]]:
    """Time all contenders in turn, until the limit."""
    nets = {name: copy.deepcopy(base) for name in CONTENDERS}
    spent: dict[str, list[float]] = {name: [] for name in nets}
    for name, net in nets.items():
        seconds(name, net, batches)
    end, turn = time.perf_counter() + limit, 0
    while turn < 5 or time.perf_counter() < end:
        first = turn % len(nets)
        for name in (*list(nets)[first:], *list(nets)[:first]):
            spent[name].append(seconds(name, nets[name], batches))
        turn += 1
    return spent


# -------------------------------------------------------------------------------- showing


def timed_rows(base: nn.Module, batches: Batches, limit: float) -> list[str]:
    """Lay out the times and errors of all contenders."""
    rows = []
    spent = times(base, batches, limit)
    for name, its in spent.items():
        ratios = [t / b for t, b in zip(its, spent[BASE], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        row = f"{name:26}{1e3 * statistics.median(its):>9.1f}{middle:>8.2f}"
        if name != BASE:
            row += f"{low:>8.2f} - {high:.2f}{_shown(*errors(name, base, batches))}"
        rows.append(row)
    return rows


def hard_case() -> tuple[nn.Module, Batches]:
    """Make one layer and ragged batches sorted by class, with means of 1000 deviations."""
    g = torch.Generator().manual_seed(0)
    sizes = (16, 16, 11, 5, 2)
    inputs = [torch.randn(n, 64, 14, 14, generator=g) + 1000 + i for i, n in enumerate(sizes)]
    return nn.BatchNorm2d(64), inputs


def _shown(var: float, mean: float) -> str:
    return f"{var:>13.1e}{mean:>11.1e}"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="LIBRARY/NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=(8, 8, 8, 8), metavar="N")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=tuple(LAYOUTS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40, help="for the rounds of one setting")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"{options.threads} threads, float32\n"
        f"batches of {', '.join(map(str, options.batches))} at {options.size} px; "
        f"time as a ratio to '{BASE}', errors in the worst channel"
    )
    if update_bn_stats is None:
        print("fvcore is not installed: left out")
    head = f"{'ms':>9}{'time':>8}{'quartiles':>15}{'variance':>13}{'mean':>11}"
    for name in options.networks:
        for layout, memory_format in LAYOUTS.items():
            if layout not in options.layouts:
                continue
            gc.collect()
            base = network(name, options.size, "cpu", memory_format)
            batches = [
                images(n, seed=i, size=options.size).to(memory_format=memory_format)
                for i, n in enumerate(options.batches)
            ]
            rows = timed_rows(base, batches, options.seconds)
            print(
                "\n" + "\n".join([f"{f'{name}, {layout}':40}", " " * 26 + head, *rows]), flush=True
            )
    layer, batches = hard_case()
    print("\none BatchNorm2d, ragged batches sorted by class, means of 1000 deviations")
    print(f"{'':26}{'variance':>13}{'mean':>11}")
    for name in CONTENDERS:
        if name != BASE:
            print(f"{name:26}{_shown(*errors(name, layer, batches))}")


if __name__ == "__main__":
    main()
