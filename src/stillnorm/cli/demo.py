"""`stillnorm demo`."""

from __future__ import annotations

from pathlib import Path

import click

from stillnorm.cli.options import format_option, show


@click.command("demo")
@click.option(
    "--page",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    default="report.html",
    show_default=True,
    help="Where to write the page with the plots.",
)
@format_option
def demo(page: Path, format: str) -> None:
    """Watch five forum threads happen on real data, and be solved.

    Trains small networks for less than three minutes; downloads nothing. Every number is measured
    here, while you wait.
    """
    if not page.parent.is_dir():  # said now, not after three minutes
        raise click.BadParameter(f"there is no folder {page.parent}", param_hint="--page")
    from stillnorm.demo import run
    from stillnorm.reports import html
    from stillnorm.state.files import write_whole

    result = run()
    show(result, result.document(), format)
    write_whole(page, html.write(result.page()).encode())
    click.echo(f"the page: {page}", err=True)
