"""One convolution and its norm, forward and backward: folded beside held, to see where it pays.

    python benchmarks/folded_layer.py [--threads 2] [--device cuda] [--rounds 21]

Folding takes the norm's passes over the map away and adds passes over the weight, and a call. What
is printed are medians of the ratios within a round, folded to held, with frozen and with learning
affine; and the rule by which `freeze(fold_on=..., fold_when="pays")` decides: a map of so many
elements has to be reached. A ratio above 1 beside a "folds" is a loss that the rule allows.

See folded_network.py for what an allocator does to such ratios.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import stillnorm as sn
from stillnorm.folding.pairs import _PER_CALL, _PER_WEIGHT


@dataclass(frozen=True)
class Shape:
    """A convolution, C_in to C_out channels, and its input (N, C_in, side, side)."""

    what: str
    batch: int
    c_in: int
    c_out: int
    side: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    def layer(self) -> nn.Sequential:
        """Make the convolution and a norm with statistics away from their initial values."""
        convolution = nn.Conv2d(
            self.c_in,
            self.c_out,
            self.kernel,
            self.stride,
            self.kernel // 2,
            groups=self.groups,
            bias=False,
        )
        norm = nn.BatchNorm2d(self.c_out)
        for tensor in (norm.running_mean, norm.bias.data):
            tensor.normal_()
        for tensor in (norm.running_var, norm.weight.data):
            tensor.uniform_(0.5, 2.0)
        return nn.Sequential(convolution, norm)


SHAPES = [
    Shape("large map, small weight", 8, 3, 32, 224, 3, 2),
    Shape("large map, small weight", 8, 64, 64, 56),
    Shape("large map, small weight", 2, 16, 96, 112),
    Shape("3 x 3", 8, 64, 64, 56, 3),
    Shape("3 x 3", 32, 128, 128, 28, 3),
    Shape("3 x 3", 8, 256, 256, 14, 3),
    Shape("1 x 1", 8, 64, 256, 56),
    Shape("1 x 1", 8, 256, 1024, 14),
    Shape("1 x 1", 32, 256, 1024, 14),
    Shape("depthwise", 8, 96, 96, 56, 3, groups=96),
    Shape("depthwise", 8, 384, 384, 14, 3, groups=384),
    Shape("depthwise", 32, 960, 960, 7, 5, groups=960),
    Shape("small map, large weight", 8, 512, 512, 7, 3),
    Shape("small map, large weight", 2, 1024, 2048, 7),
    Shape("small map, large weight", 2, 512, 512, 4, 3),
    Shape("small map, small weight", 2, 32, 32, 14),
]
HEAD = (
    f"{'':24}{'map':>17}{'weight':>14}{'elements':>12}{'needed':>11}{'rule':>7}"
    f"{'frozen':>8}{'learns':>8}"
)


def seconds(layer: nn.Module, x: Tensor, dy: Tensor, repeats: int) -> float:
    """Time a step, the mean of `repeats`."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        x.grad = None
        layer.zero_grad()
        layer(x).backward(dy)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def ratio(
    shape: Shape, affine: str, layout: torch.memory_format, device: str, rounds: int
) -> float:
    """Return the time of a step folded, as a ratio to held: the median over rounds."""
    x = torch.randn(shape.batch, shape.c_in, shape.side, shape.side, device=device)
    x = x.to(memory_format=layout).requires_grad_()
    held, folded = (shape.layer().to(device, memory_format=layout) for _ in range(2))
    folded.load_state_dict(held.state_dict())
    sn.freeze(held, affine=affine)
    if not sn.freeze(folded, affine=affine, fold_on=x, fold_when="always").folded:
        sys.exit(f"{shape} was not folded")
    dy = torch.randn_like(held(x))
    repeats = max(1, int(0.01 / max(seconds(layer, x, dy, 3) for layer in (held, folded))))
    ratios = []
    for turn in range(rounds):
        order = (held, folded) if turn % 2 else (folded, held)
        spent = {layer: seconds(layer, x, dy, repeats) for layer in order}
        ratios.append(spent[folded] / spent[held])
    return statistics.median(ratios)


def main() -> None:
    """Print a table for each memory layout."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    print(
        f"torch {torch.__version__}, {where}, {options.threads} threads, float32, "
        f"median of {options.rounds} paired rounds\n"
        f"time folded / time held; the rule: elements of the map >= {_PER_WEIGHT} x elements of "
        f"the weight + {_PER_CALL:,}"
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        print(f"\n{str(layout).removeprefix('torch.').removesuffix('_format')}\n{HEAD}")
        for shape in SHAPES:
            side = -(-shape.side // shape.stride)
            map_shape = (shape.batch, shape.c_out, side, side)
            weight_shape = (shape.c_out, shape.c_in // shape.groups, shape.kernel, shape.kernel)
            elements = math.prod(map_shape)
            needed = _PER_WEIGHT * math.prod(weight_shape) + _PER_CALL
            measured = [
                ratio(shape, affine, layout, options.device, options.rounds)
                for affine in ("frozen", "trains")
            ]
            print(
                f"{shape.what:24}{'x'.join(map(str, map_shape)):>17}"
                f"{'x'.join(map(str, weight_shape)):>14}{elements:>12,}{needed:>11,.0f}"
                f"{'folds' if elements >= needed else '-':>7}"
                + "".join(f"{value:>8.2f}" for value in measured),
                flush=True,
            )


if __name__ == "__main__":
    main()
