"""How often the rules about data are wrong: SN106, SN110, SN308 and SN309.

    python benchmarks/data_rules.py [seeds]

Networks with random weights and statistics of 64 samples are checked on 128 fresh ones in batches
of 16: as they are (every finding is false), with data of another domain (SN105 is right, SN106 and
SN110 are false), with statistics that are another network's (the same), and with the faults that
the rules are for.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from diagnosis.nets import estimated
from stillnorm import check
from stillnorm.norms import find_norms
from support.zoo import images, make

CODES = ("SN105", "SN106", "SN110", "SN308", "SN309")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

Draw = Callable[[int, int], Tensor]
Batches = list[Tensor]


def pictures(n: int, seed: int) -> Tensor:
    """Smooth images, warm in colour, normalised as torchvision's models want them."""
    tint = torch.tensor([0.6, 0.0, -0.6]).view(1, 3, 1, 1)
    return ((images(n, seed, size=32) + tint).sigmoid() - MEAN) / STD


def heavy(n: int, seed: int) -> Tensor:
    """Sequences whose loudness is log-normal: a few carry most of the variance."""
    g = torch.Generator().manual_seed(seed)
    loud = torch.exp(0.7 * torch.randn(n, 1, 1, generator=g))
    return loud * (torch.randn(n, 16, 32, generator=g) + torch.randn(n, 16, 1, generator=g))


def rows(n: int, seed: int) -> Tensor:
    """Rows of four classes, columns of scales from 0.1 to 10."""
    g = torch.Generator().manual_seed(seed)
    classes = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    x = classes[torch.randint(0, 4, (n,), generator=g)] + torch.randn(n, 16, generator=g)
    return torch.logspace(-1, 1, 16) * x


def sequence_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    first = [nn.Conv1d(16, 32, 5), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(*first, nn.Conv1d(32, 32, 5), nn.BatchNorm1d(32), nn.ReLU())


def row_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    first = [nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU())


NETS: dict[str, tuple[Callable[[int], nn.Module], Draw]] = {
    "resnet18": (lambda seed: make("torchvision/resnet18", seed, calibrated=False), pictures),
    "mobilenet": (lambda seed: make("timm/lcnet_050", seed, calibrated=False), pictures),
    "sequences": (sequence_net, heavy),
    "rows": (row_net, rows),
}


def stale(model: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    for layer in find_norms(model):
        mean, var = layer.module.running_mean, layer.module.running_var
        mean += var.sqrt() * torch.randn(len(mean), generator=g)
        var *= torch.randn(len(var), generator=g).exp()


def root(model: nn.Module, seed: int) -> None:
    for layer in find_norms(model):
        layer.module.running_var.sqrt_()


def other_domain(x: Tensor, seed: int) -> Batches:
    g = torch.Generator().manual_seed(seed)
    gain = torch.exp(torch.randn(1, x.shape[1], *[1] * (x.dim() - 2), generator=g))
    return list((gain * x + torch.randn(gain.shape, generator=g)).split(16))


def in_turns(x: Tensor, seed: int) -> Batches:
    return [batch + i % 2 * x.std() for i, batch in enumerate(x.split(16))]


def in_order(x: Tensor, seed: int) -> Batches:
    return list(x[x.flatten(1).mean(1).argsort()].split(16))


def as_they_are(x: Tensor, seed: int) -> Batches:
    return list(x.split(16))


def not_normalised(x: Tensor, seed: int) -> Batches:
    return list((x * STD + MEAN).split(16)) if x.dim() == 4 else as_they_are(x, seed)


CASES: dict[str, tuple[Callable[[nn.Module, int], None] | None, Callable[[Tensor, int], Batches]]]
CASES = {
    "healthy": (None, as_they_are),
    "other domain": (None, other_domain),
    "stale": (stale, as_they_are),
    "not normalised": (None, not_normalised),
    "deviations": (root, as_they_are),
    "in turns": (None, in_turns),
    "in order": (None, in_order),
}


def main(seeds: int) -> None:
    print(f"found in networks, of{'':19}{''.join(f'{code:>7}' for code in CODES)}")
    for case, (spoil, batches) in CASES.items():
        for net, (build, draw) in NETS.items():
            found: Counter[str] = Counter()
            for seed in range(seeds):
                model = estimated(build(seed), draw(64, 1000 + seed)).eval()
                if spoil is not None:
                    spoil(model, seed)
                report = check(model, batches(draw(128, seed), seed), select=CODES)
                found.update({f.code for f in report.findings})
            cells = "".join(f"{found[code]:>7}" for code in CODES)
            print(f"{case:>15} {net:>12} {seeds:>10}{cells}", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
