"""`stillnorm check`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from stillnorm.cli import targets
from stillnorm.cli.failures import FINDINGS, INTERNAL
from stillnorm.cli.options import TARGETS, load, on_model, show, working


@click.command("check", epilog=TARGETS)
@on_model
@click.option(
    "--score",
    metavar="TARGET",
    help="A function (output, batch) -> number, higher is better: your own metric.",
)
@click.option("--max-batches", type=click.IntRange(1), default=8, show_default=True)
@click.option("--select", metavar="RULES", help="Only these: codes, their beginnings, or slugs.")
@click.option("--ignore", metavar="RULES", help="Not these; several with commas between.")
@click.option(
    "--fail-on",
    type=click.Choice(["error", "warning", "info", "never"]),
    default="error",
    show_default=True,
    help="Exit with 1 when there is a finding this severe or worse.",
)
@click.option("--verbose", is_flag=True, help="Every finding open, and all that was not checked.")
@click.pass_context
def check(
    ctx: click.Context,
    target: str,
    weights: Path | None,
    data: str | None,
    forward: str | None,
    device: str | None,
    format: str,
    score: str | None,
    max_batches: int,
    select: str | None,
    ignore: str | None,
    fail_on: Literal["error", "warning", "info", "never"],
    verbose: bool,
) -> None:
    """Find what is wrong with a model's norm layers.

    Without --data the rules that need no data run. With it, each layer's statistics are compared
    with what it receives; with --score too, what that costs is said in your own unit.

    Exit codes: 0 clean, 1 findings (--fail-on), 2 bad usage or unreadable input, 3 a bug of ours.
    """
    if score is not None and data is None:
        raise click.UsageError("--score needs --data")
    loaded = load(target, weights, data, forward, device)
    scorer = None if score is None else targets.load_function(score, "output", "batch")
    with working("checking"):
        from stillnorm.diagnosis import check as examine

        report = examine(
            loaded.model,
            loaded.data,
            forward=loaded.forward,
            score=scorer,
            max_batches=max_batches,
            select=select,
            ignore=ignore,
        )
    show(report, report.document(verbose=verbose), format)
    if fail_on != "never" and any(finding.at_least(fail_on) for finding in report.findings):
        ctx.exit(FINDINGS)
    if report.crashed:
        ctx.exit(INTERNAL)
