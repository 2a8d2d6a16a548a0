"""One frozen batch norm layer, forward and backward: time and saved bytes beside its peers.

    python benchmarks/frozen_layer.py [--device cuda] [--threads 2] [--rounds 41]

In one run, interleaved, the layers take turns on the same input; what is printed are medians of
the ratios within a round to torchvision's FrozenBatchNorm2d, so that a slow moment of the machine
hits all of them. Saved bytes are exact: what autograd keeps for backward beyond the layer's own
parameters and buffers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import stillnorm as sn
from support.zoo import torchvision

SHAPES = [
    (8, 64, 56, 56),
    (8, 256, 28, 28),
    (2, 64, 112, 112),
    (32, 64, 28, 28),
    (8, 512, 7, 7),
    (2, 2048, 4, 4),
    (1, 32, 4, 4),
]


def layers(channels: int, device: str) -> dict[str, nn.Module]:
    """Make the layers to compare, with the same statistics and affine parameters."""
    plain = nn.BatchNorm2d(channels)
    for tensor in (plain.running_mean, plain.bias.data):
        tensor.normal_()
    for tensor in (plain.running_var, plain.weight.data):
        tensor.uniform_(0.5, 2.0)
    torchvision_frozen = torchvision.ops.FrozenBatchNorm2d(channels)
    torchvision_frozen.load_state_dict(plain.state_dict())
    held = nn.BatchNorm2d(channels)
    held.load_state_dict(plain.state_dict())
    sn.freeze(held)
    evaluated = plain.eval().requires_grad_(False)
    return {
        name: layer.to(device)
        for name, layer in (
            ("torchvision", torchvision_frozen),
            ("F.batch_norm", evaluated),
            ("stillnorm", held),
        )
    }


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Count the bytes that autograd keeps, without the layer's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def seconds(run: Callable[[], None], repeats: int, device: str) -> float:
    """Time `repeats` runs."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure(
    shape: tuple[int, ...], layout: torch.memory_format, device: str, rounds: int
) -> dict[str, tuple[float, float, int]]:
    """Return by layer: median ratio to torchvision, median milliseconds, saved bytes."""
    x = torch.randn(shape, device=device).to(memory_format=layout).requires_grad_()
    dy = torch.randn(shape, device=device).to(memory_format=layout)
    contenders = layers(shape[1], device)

    def step(layer: nn.Module) -> None:
        x.grad = None
        layer(x).backward(dy)

    runs = {name: (lambda layer=layer: step(layer)) for name, layer in contenders.items()}
    for run in runs.values():
        seconds(run, 3, device)
    once = min(seconds(run, 3, device) for run in runs.values())
    repeats = max(1, int(0.004 / once))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        order = list(runs) if turn % 2 else list(reversed(runs))
        for name in order:
            times[name].append(seconds(runs[name], repeats, device))
    base = times["torchvision"]
    return {
        name: (
            statistics.median(t / b for t, b in zip(times[name], base, strict=True)),
            1e3 * statistics.median(times[name]),
            saved_bytes(layer, x),
        )
        for name, layer in contenders.items()
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {where}, "
        f"{options.threads} threads, float32, median of {options.rounds} paired rounds"
    )
    print("time as a ratio to torchvision's FrozenBatchNorm2d; saved in bytes\n")
    names = ("torchvision", "F.batch_norm", "stillnorm")
    head = f"{'shape':18}{'layout':15}"
    print(
        head + "".join(f"{name:>14}" for name in names) + "".join(f"{n + ' B':>15}" for n in names)
    )
    for shape in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            result = measure(shape, layout, options.device, options.rounds)
            label = "x".join(map(str, shape))
            row = f"{label:18}{str(layout).removeprefix('torch.').removesuffix('_format'):15}"
            row += "".join(f"{result[name][0]:>14.2f}" for name in names)
            print(row + "".join(f"{result[name][2]:>15,}" for name in names))


if __name__ == "__main__":
    main()
