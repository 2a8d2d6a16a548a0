"""`stillnorm recalibrate`."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from stillnorm.cli.options import TARGETS, load, on_model, show, working
from stillnorm.cli.weights import must_be_tensors, must_have_a_folder
from stillnorm.errors import CalibrationError
from stillnorm.reports.numbers import count, short

if TYPE_CHECKING:
    from torch import nn

    from stillnorm.calibration.progress import OnProgress, Progress


@click.command("recalibrate", epilog=TARGETS)
@partial(on_model, needs_data=True)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Where to write the model's tensors with the new statistics: .safetensors. Without it, "
    "what would change is told and nothing is written.",
)
@click.option(
    "--layers",
    multiple=True,
    metavar="PATH",
    help="Only these layers: a path, or a pattern like 'layer1.*.bn2'; what lies below it is "
    "included. Can be given several times.",
)
@click.option(
    "--method",
    type=click.Choice(["pooled", "sequential"]),
    default="pooled",
    show_default=True,
    help="pooled: one pass, normalising by the batch as in training. sequential: every layer on "
    "what it receives in eval mode.",
)
@click.option("--max-batches", type=click.IntRange(1), metavar="N", help="Stop after so many.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    metavar="ERROR",
    help="Stop as soon as the standard error is at most this: 0.01 is one percent of a deviation. "
    "The batches must come in random order.",
)
@click.pass_context
def recalibrate(
    ctx: click.Context,
    target: str,
    weights: Path | None,
    data: str,
    forward: str | None,
    device: str | None,
    format: str,
    out: Path | None,
    layers: tuple[str, ...],
    method: Literal["pooled", "sequential"],
    max_batches: int | None,
    tolerance: float | None,
) -> None:
    """Re-estimate a model's running statistics on data, with all weights fixed.

    Use training data, with the preprocessing of training. The file is written whole or not at all.

    Started by "torchrun --nproc-per-node 4 -m stillnorm recalibrate ...", the processes share the
    batches, and the result is that of one alone.

    Every process reads all batches and runs its own; give a DataLoader a DistributedSampler to
    share the reading too. --device cuda is then a GPU for each.
    """
    if out is not None and out.suffix != ".safetensors":
        raise click.UsageError(f"--out {out.name}: the file is written as .safetensors only")
    from stillnorm.calibration import recalibrate as estimate
    from stillnorm.cli.torchrun import length, processes

    with processes(device, whole=ctx.find_root().params["traceback"]) as group:
        file = out if group.rank == 0 else None
        group.all(lambda: must_have_a_folder(file))
        loaded = group.all(lambda: load(target, weights, data, forward, None))
        if out is not None:
            must_be_tensors(loaded.model.state_dict())
        mine = group.share(loaded.data, max_batches)
        placed = group.all(lambda: replace(loaded, data=mine).on(group.device(device)))
        with _bar(length(mine, max_batches), tolerance, group.size) as progress:
            report = estimate(
                placed.model,
                placed.data,
                layers or None,
                forward=placed.forward,
                method=method,
                max_batches=max_batches,
                tolerance=tolerance,
                progress=progress,
            )
        if not report.layers:
            raise CalibrationError(
                "there is no layer to recalibrate",
                help="stillnorm inspect shows what norms there are, and what holds them",
            )
        group.all(lambda: _write(placed.model, file))
        show(report, report.document(), format)
        kept = "nothing is written: --out FILE.safetensors keeps the statistics"
        click.echo(kept if out is None else f"the model with these statistics: {out}", err=True)


def _write(model: nn.Module, out: Path | None) -> None:
    if out is not None:
        from stillnorm.state.files import write_tensors

        with working(f"writing {out.name}"):
            write_tensors(out, model.state_dict(), {})


@contextlib.contextmanager
def _bar(total: int | None, tolerance: float | None, ranks: int) -> Iterator[OnProgress | None]:
    """Draw on a terminal's stderr how far it is; what the user's code prints goes there too.

    Args:
        total: The number of batches, of this process; None where nobody knows.
        tolerance: The standard error at which to stop.
        ranks: The number of processes, which run as fast as this one.
    """
    with contextlib.redirect_stdout(sys.stderr):
        if not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(None), TextColumn("{task.description}"), TimeElapsedColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True, expand=True) as bar:
            task = bar.add_task("reading the first batch", total=total)
            start = time.monotonic()

            def tell(now: Progress) -> None:
                rate = f"{now.samples * ranks / (time.monotonic() - start):.0f} samples/s"
                parts = (_done(now, total), rate, _error(now, tolerance, ranks))
                bar.update(
                    task,
                    completed=now.settled or now.batches,
                    total=now.layers if now.settled else total,
                    description=", ".join(filter(None, parts)),
                )

            yield tell


def _done(now: Progress, total: int | None) -> str:
    """Say how far the first pass over the batches is; after it, how many layers are final."""
    if now.settled == now.layers:
        return f"checking {count(now.layers, 'layer')}"
    if now.settled:
        return f"{now.settled}/{count(now.layers, 'layer')}"
    return (
        count(now.batches, "batch") if total is None else f"{now.batches}/{count(total, 'batch')}"
    )


def _error(now: Progress, tolerance: float | None, ranks: int) -> str:
    """Say the standard error of all processes together, to judge by this one's."""
    if now.error is None:
        return ""
    goal = "" if tolerance is None else f", goal {short(tolerance)}"
    return f"standard error {short(now.error / math.sqrt(ranks))}{goal}"
