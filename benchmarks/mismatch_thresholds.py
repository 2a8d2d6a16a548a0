"""How often SN105 is wrong, and what it finds: the measurement behind its thresholds.

    python benchmarks/mismatch_thresholds.py [seeds]

Real architectures with random weights, recalibrated on 64 images in batches of 32, are looked at
through 64 fresh ones. Healthy: how many models are accused, by the eval flow alone, by the batch
flow alone, and by the rule (the batch flow, of which the eval flow shows half, with single samples
all), on even images and on heavy-tailed ones, in batches of 16, 2 and 1. Broken, one fault at a
time: how often it is found, and how many other layers are accused with it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from stillnorm import recalibrate
from stillnorm.diagnosis.measures.measure import Distance, Samples, distance, samples_of
from stillnorm.norms import NormLayer, find_norms
from stillnorm.tracing import trace
from support.zoo import images, make

ARCHITECTURES = (
    "torchvision/resnet18",
    "torchvision/mobilenet_v2",
    "torchvision/shufflenet_v2_x0_5",
    "timm/resnet10t",
    "timm/regnety_002",
    "transformers/resnet",
)
COUNTS = (8, 16, 32, 64)
RULES: dict[str, Callable[[dict[str, Distance], int], bool]] = {
    "eval": lambda seen, size: seen["eval"].is_far(),
    "batch": lambda seen, size: seen["batch"].is_far(),
    "rule": lambda seen, size: (
        seen["batch"].is_far()
        and (seen["eval"].is_far() if size == 1 else seen["eval"].exceeds(0.5))
    ),
}


def heavy_tailed(n: int, seed: int) -> Tensor:
    """Images whose contrast is log-normal: a few carry most of the variance."""
    g = torch.Generator().manual_seed(seed)
    return images(n, seed) * torch.exp(0.5 * torch.randn(n, 1, 1, 1, generator=g))


DRAWS: dict[str, Callable[[int, int], Tensor]] = {"even": images, "heavy": heavy_tailed}


def move(layer: NormLayer, mean: float = 0.0, var: float = 1.0) -> None:
    """Move a layer's statistics by `mean` deviations and a factor `var`."""
    running_mean, running_var = layer.module.running_mean, layer.module.running_var
    running_mean += mean * running_var.sqrt()
    running_var *= var


FAULTS: dict[str, Callable[[NormLayer], None]] = {
    "mean + 0.4 sigma": lambda layer: move(layer, mean=0.4),
    "mean + 0.7 sigma": lambda layer: move(layer, mean=0.7),
    "variance x 2": lambda layer: move(layer, var=2),
    "variance x 4": lambda layer: move(layer, var=4),
    "variance / 2": lambda layer: move(layer, var=1 / 2),
    "variance / 4": lambda layer: move(layer, var=1 / 4),
}


def healthy_model(name: str, seed: int, draw: Callable[[int, int], Tensor]) -> nn.Module:
    model = make(name, seed)
    recalibrate(model, iter(draw(64, 100 + seed).split(32)))
    return model


def distances(
    model: nn.Module, batches: tuple[Tensor, ...]
) -> Iterator[tuple[int, NormLayer, dict[str, Distance]]]:
    """Yield per number of samples and layer the distance in each flow."""
    sizes = [len(batch) for batch in batches]
    seen = {flow: trace(model, iter(batches), flow=flow) for flow in ("eval", "batch")}
    for layer in find_norms(model):
        rows = {flow: samples_of(t.by_layer(layer.path), sizes) for flow, t in seen.items()}
        for n in COUNTS:
            yield n, layer, {flow: _first(layer, n, of) for flow, of in rows.items() if of}


def _first(layer: NormLayer, n: int, of: Samples) -> Distance:
    part = Samples(of.mean[:n], of.square[:n], of.per_batch)
    found = distance(layer.running_mean, layer.running_var, layer.eps, part, instance=False)
    if found is None:
        raise RuntimeError(f"{layer.path} cannot be measured")
    return found


def healthy(seeds: int) -> None:
    print(f"healthy models accused, of {seeds * len(ARCHITECTURES)}")
    print("images  batch  samples   eval  batch   rule   largest mean, variance in the batch flow")
    for kind, size in product(DRAWS, (16, 2, 1)):
        accused = {(n, rule): set[tuple[str, int]]() for n in COUNTS for rule in RULES}
        largest = dict.fromkeys(COUNTS, (0.0, 0.0))
        for name, seed in product(ARCHITECTURES, range(seeds)):
            model = healthy_model(name, seed, DRAWS[kind])
            fresh = DRAWS[kind](64, 10_000 + seed).split(size)
            for n, _, by_flow in distances(model, fresh):
                for rule, accuses in RULES.items():
                    if accuses(by_flow, size):
                        accused[n, rule].add((name, seed))
                mean, variance = by_flow["batch"].mean, by_flow["batch"].variance
                largest[n] = (max(largest[n][0], mean), max(largest[n][1], variance))
        for n in COUNTS:
            numbers = "".join(f"{len(accused[n, rule]):>7}" for rule in RULES)
            mean, variance = largest[n]
            print(f"{kind:>6} {size:>6} {n:>8}{numbers}   {mean:.2f} {variance:.2f}", flush=True)


def broken(seeds: int) -> None:
    print("\nfault found, + other layers accused per model; batches of 16")
    models = seeds * len(ARCHITECTURES)
    for fault, apply in FAULTS.items():
        hits, others = Counter[tuple[int, str]](), Counter[tuple[int, str]]()
        for name, seed in product(ARCHITECTURES, range(seeds)):
            model = healthy_model(name, seed, images)
            layers = find_norms(model)
            victim = layers[len(layers) // 3]
            apply(victim)
            for n, layer, by_flow in distances(model, images(64, 10_000 + seed).split(16)):
                for rule, accuses in RULES.items():
                    if accuses(by_flow, 16):
                        count = hits if layer.module is victim.module else others
                        count[n, rule] += 1
        for n in (16, 32, 64):
            cells = "  ".join(
                f"{rule} {hits[n, rule]}/{models} +{others[n, rule] / models:.1f}" for rule in RULES
            )
            print(f"{fault:>16} {n:>3} samples  {cells}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        healthy(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
        broken(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
