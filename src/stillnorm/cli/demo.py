"""`stillnorm demo`."""

from __future__ import annotations

import click


@click.command("demo")
def demo() -> None:
    """Watch five forum threads happen on real data, and be solved."""
    raise NotImplementedError
