"""`stillnorm diff`."""

from __future__ import annotations

from pathlib import Path

import click

from stillnorm.cli.failures import FINDINGS
from stillnorm.cli.options import format_option, show, working


@click.command("diff")
@click.argument("before", type=click.Path(path_type=Path), metavar="A")
@click.argument("after", type=click.Path(path_type=Path), metavar="B")
@format_option
@click.pass_context
def diff(ctx: click.Context, before: Path, after: Path, format: str) -> None:
    """Compare the norm layers of two checkpoints, bit by bit.

    Names each tensor that differs, the channel where it differs most, and by how much. Of other
    layers only the count is told. Nothing is unpickled but tensors.

    Exit codes: 0 equal, 1 different, 2 unreadable input.
    """
    with working("reading"):
        from stillnorm.state.diff import diff_states
        from stillnorm.state.files import read_state

        difference = diff_states(read_state(before), read_state(after))
    show(difference, difference.document(), format)
    if difference:
        ctx.exit(FINDINGS)
