"""Whole networks, forward and backward: what norms cost, held, folded, and beside their peers.

    python benchmarks/folded_network.py [--networks torchvision/resnet50 timm/efficientnet_b0]
        [--batches 2 8 32] [--layouts contiguous channels_last] [--size 160] [--threads 2]
        [--device cuda] [--compile] [--only folded mmengine] [--seconds 60]
        [--json FILE] [--plot DIR]

The limit is the network without norms: each folded by hand, once, into the convolution before it,
so that the values are the same, and those that follow no convolution removed. In one run,
interleaved, the contenders take turns in a rotating order; what is printed are medians of the
ratios within a round to the limit, with half their interquartile range. Saved bytes are exact:
what autograd keeps for backward beyond the network's own parameters and buffers.

Affine is frozen unless the name says that it learns; in train mode it learns too. The limit's
biases learn, so that a frozen network can be a little faster than the limit.

On Linux, glibc returns large freed blocks to the kernel, and the page faults of the next step are
a large share of its time, which differs between contenders by chance. With an allocator that
keeps them (LD_PRELOAD of tcmalloc or jemalloc) the ratios are far more repeatable.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path

import torch
from contenders import (
    CONTENDERS,
    LIMIT,
    NETWORKS,
    Contender,
    images,
    network,
    norms_of,
    timm,
    torchvision,
)
from torch import Tensor, nn

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Row:
    """What was measured of one contender.

    Args:
        name: The contender's name.
        folded: How many norms are computed in the convolutions before them.
        seconds: Of a step, by round.
        time: Median ratio to the limit, within a round.
        spread: Half the interquartile range of these ratios.
        saved_bytes: What autograd keeps for backward.
        saved: The same as a ratio to the limit.
    """

    name: str
    folded: int
    seconds: tuple[float, ...]
    time: float
    spread: float
    saved_bytes: int
    saved: float


@dataclass(frozen=True)
class Setting:
    """One network, batch size and memory layout, and what was measured."""

    network: str
    batch: int
    size: int
    layout: str
    device: str
    threads: int
    compiled: bool
    norms: int
    rows: tuple[Row, ...]
    left_out: dict[str, str]

    @property
    def title(self) -> str:
        """Name the setting without the network."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        where = threads if self.device == "cpu" else self.device
        how = ", torch.compile" if self.compiled else ""
        return f"{self.batch} x 3 x {self.size} x {self.size}, {self.layout}, {where}{how}"


# -------------------------------------------------------------------------------- measuring


def saved_bytes(net: nn.Module, x: Tensor) -> int:
    """Count the bytes that autograd keeps, each storage once, without the network's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers())}
    # Storages, not tensors: a tensor here would keep the graph alive that keeps this dictionary.
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net(x)  # noqa: F841, its graph keeps the storages apart
    return sum(storage.nbytes() for storage in kept.values())


def seconds(net: nn.Module, x: Tensor, dy: Tensor, repeats: int) -> float:
    """Time a step, the mean of `repeats`."""
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        net.zero_grad()
        net(x).backward(dy)
    if x.is_cuda:
        torch.cuda.synchronize()
    elapsed = time.perf_counter() - start
    net.zero_grad()
    return elapsed / repeats


@dataclass(frozen=True)
class Ready:
    """A contender that has made its first steps."""

    net: nn.Module
    folded: int
    saved_bytes: int
    seconds: float


def ready(contender: Contender, base: nn.Module, x: Tensor, dy: Tensor, compiled: bool) -> Ready:
    """Build a contender and run it."""
    net, folded = contender.build(base, x)
    if compiled:
        net = torch.compile(net)
    seconds(net, x, dy, 2)
    return Ready(net, folded, saved_bytes(net, x), seconds(net, x, dy, 1))


def measure(name: str, batch: int, layout: str, options: argparse.Namespace) -> Setting:
    """Measure all contenders in one setting."""
    base = network(name, options.size, options.device, LAYOUTS[layout])
    x = images(batch, size=options.size).to(options.device, memory_format=LAYOUTS[layout])
    with torch.no_grad():
        dy = torch.randn_like(base(x)) / batch
    taking_part: dict[str, Ready] = {}
    left_out: dict[str, str] = {}
    for contender in CONTENDERS:
        if contender.name != LIMIT and not any(word in contender.name for word in options.only):
            continue
        try:
            taking_part[contender.name] = ready(contender, base, x, dy, options.compile)
        except Exception as error:  # a peer that cannot take part is no reason to stop
            if contender.name == LIMIT:
                raise
            reason = f"{type(error).__name__}: {error}".removeprefix("LeftOutError: ")
            left_out[contender.name] = " ".join(reason.split())
    repeats = max(1, int(0.05 / min(one.seconds for one in taking_part.values())))
    times: dict[str, list[float]] = {one: [] for one in taking_part}
    end = time.perf_counter() + options.seconds
    for turn in range(201):
        if turn >= 5 and time.perf_counter() > end:
            break
        order = list(times)
        first = turn % len(order)
        for one in (*order[first:], *order[:first]):
            times[one].append(seconds(taking_part[one].net, x, dy, repeats))
    rows = []
    for one, spent in times.items():
        ratios = [t / limit for t, limit in zip(spent, times[LIMIT], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        ran, limit = taking_part[one], taking_part[LIMIT]
        saved = ran.saved_bytes / limit.saved_bytes
        spread = (high - low) / 2
        rows.append(Row(one, ran.folded, tuple(spent), middle, spread, ran.saved_bytes, saved))
    return Setting(
        name,
        batch,
        options.size,
        layout,
        options.device,
        options.threads,
        options.compile,
        len(norms_of(base)),
        tuple(rows),
        left_out,
    )


# -------------------------------------------------------------------------------- showing


def table(setting: Setting) -> str:
    """Lay a setting out as text."""
    rounds = len(setting.rows[0].seconds)
    removed = setting.norms - setting.rows[0].folded
    note = f", {removed} of them after no convolution" if removed else ""
    lines = [
        f"{setting.network}, {setting.title}",
        f"{setting.norms} norms{note}; median of {rounds} paired rounds",
        "",
        f"{'':34}{'folded':>8}{'ms a step':>12}{'time':>9}{'+-':>7}{'saved MB':>13}{'saved':>9}",
    ]
    for row in setting.rows:
        milliseconds = 1e3 * statistics.median(row.seconds)
        lines.append(
            f"{row.name:34}{row.folded or '-':>8}{milliseconds:>12.1f}{row.time:>9.2f}"
            f"{row.spread:>7.2f}{row.saved_bytes / 1e6:>13.2f}{row.saved:>9.2f}"
        )
    lines += [f"{f'{name:34}left out: {why}':.100}" for name, why in setting.left_out.items()]
    return "\n".join(lines)


ROW, LABEL, COLUMN, WIDTH = 22, 232, 300, 860
INK, QUIET, PEER, LIMITED, OURS = "#1f2933", "#616e7c", "#b8c4d0", "#52606d", "#0f8b8d"


def chart(settings: list[Setting]) -> str:
    """Draw the settings of one network as bars of both ratios, in SVG."""
    parts: list[str] = []

    def text(x: float, y: float, what: str, style: str = "") -> None:
        parts.append(f'<text x="{x:g}" y="{y:g}" {style}>{escape(what)}</text>')

    strong, quiet = 'font-weight="600"', f'fill="{QUIET}"'
    text(24, 36, settings[0].network, 'font-size="19" font-weight="600"')
    text(24, 57, "forward and backward, as ratios to the network without norms", quiet)
    y = 92
    for setting in settings:
        text(24, y, setting.title, strong)
        y += 24
        bottom = y + 12 + ROW * len(setting.rows)
        columns = (
            ("time", [row.time for row in setting.rows]),
            ("saved for backward", [row.saved for row in setting.rows]),
        )
        for place, (label, values) in enumerate(columns):
            left = LABEL + place * (COLUMN + 14)
            scale = (COLUMN - 56) / max(values)
            text(left, y, label, quiet)
            for i, (row, value) in enumerate(zip(setting.rows, values, strict=True)):
                top = y + 10 + ROW * i
                ours = row.name.startswith("stillnorm")
                fill = OURS if ours else LIMITED if row.name == LIMIT else PEER
                length = value * scale
                parts.append(
                    f'<rect x="{left}" y="{top}" width="{length:.1f}" height="{ROW - 6}" '
                    f'rx="2" fill="{fill}"/>'
                )
                text(round(left + max(length, scale) + 7), top + 12.5, f"{value:.2f}")
                if not place:
                    text(LABEL - 12, top + 12.5, row.name, 'text-anchor="end"')
            parts.append(
                f'<path d="M{left + scale:.1f} {y + 6}V{bottom}" stroke="{INK}" '
                'stroke-dasharray="2 3"/>'
            )
        y = bottom + 38
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y - 18}" width="{WIDTH}" '
        f'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="13" fill="{INK}">'
    )
    background = f'<rect width="{WIDTH}" height="{y - 18}" fill="#ffffff"/>'
    return "\n".join([head, background, *parts, "</svg>"]) + "\n"


def main() -> None:
    """Print the tables, write the numbers and the charts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="LIBRARY/NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=(2, 8, 32), metavar="N")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=tuple(LAYOUTS))
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="under torch.compile")
    parser.add_argument("--only", nargs="+", default=("",), help="words in contenders' names")
    parser.add_argument("--seconds", type=float, default=60, help="for the rounds of one setting")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="write a chart per network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # All contenders share one forward; each of them is compiled.
    torch._dynamo.config.recompile_limit = 4 * len(CONTENDERS)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    where = torch.cuda.get_device_name() if options.device.startswith("cuda") else "cpu"
    allocator = os.environ.get("LD_PRELOAD")
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"timm {timm.__version__}, {where}, {options.threads} threads, float32\n"
        f"preloaded: {Path(allocator).name if allocator else 'no allocator'}\n"
        f"time and saved bytes as ratios to '{LIMIT}'\n"
    )
    measured: list[Setting] = []
    for name in options.networks:
        for batch in options.batches:
            for layout in options.layouts:
                gc.collect()
                measured.append(measure(name, batch, layout, options))
                print(table(measured[-1]) + "\n", flush=True)
        if options.json:
            options.json.write_text(json.dumps([asdict(s) for s in measured], indent=1) + "\n")
        if options.plot:
            options.plot.mkdir(parents=True, exist_ok=True)
            drawn = chart([s for s in measured if s.network == name])
            (options.plot / f"{name.replace('/', '_')}.svg").write_text(drawn)


if __name__ == "__main__":
    main()
