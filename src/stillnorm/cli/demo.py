"""`stillnorm demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillnorm.cli.options import format_option, show_text

if TYPE_CHECKING:
    from stillnorm.reports import Document


@click.command("demo")
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default="report.html",
    show_default=True,
    help="Where to write the page with the plots; the numbers go beside it, into demo.json.",
)
@click.option("--seed", default=0, show_default=True, help="Of everything random.")
@format_option
def demo(out: Path, seed: int, format: str) -> None:
    """Watch five forum threads happen on real data, and be solved.

    Trains small networks for less than three minutes; downloads nothing. Every number is measured
    here, while you wait.
    """
    if not out.parent.is_dir():  # said now, not after three minutes
        raise click.BadParameter(f"there is no folder {out.parent}", param_hint="--out")
    from stillnorm.demo import run
    from stillnorm.reports import html
    from stillnorm.state.files import write_whole

    told = run(seed, tell=_tell if format == "text" else None)
    if format == "text":
        show_text(told.summary())
    else:
        click.echo(told.to_json())
    write_whole(out, html.write(told.page()).encode())
    write_whole(out.with_name("demo.json"), told.to_json().encode())
    click.echo(f"the page: {out}", err=True)


def _tell(chapter: Document) -> None:
    show_text(chapter)
    click.echo()
