"""`stillnorm inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from stillnorm.cli.options import FILES, load, on_model, show, working


@click.command("inspect", epilog=FILES)
@on_model
@click.option("--all", "every", is_flag=True, help="One row per layer: do not collapse siblings.")
def inspect(
    target: str,
    weights: Path | None,
    data: str | None,
    forward: str | None,
    device: str | None,
    format: str,
    every: bool,
) -> None:
    """See what every norm layer of a model does.

    What it normalises by in train() and in eval(), whether it updates statistics and learns, and
    what holds it. With --data also what a real forward used.
    """
    loaded = load(target, weights, data, forward, device, files=True)
    with working("inspecting"):
        from stillnorm.diagnosis import inspect as look

        seen = look(loaded.file or loaded.model, loaded.data, forward=loaded.forward)
    show(seen, seen.document(all=every), format)
