"""The program `stillnorm`: its commands, and what happens when one fails."""

from __future__ import annotations

from typing import Any

import click

from stillnorm.cli.check import check
from stillnorm.cli.demo import demo
from stillnorm.cli.diff import diff
from stillnorm.cli.explain import explain
from stillnorm.cli.export import export
from stillnorm.cli.failures import report
from stillnorm.cli.fold import fold
from stillnorm.cli.inspect import inspect
from stillnorm.cli.port import port
from stillnorm.cli.recalibrate import recalibrate

_NO_FREEZE = (
    "There is no freeze command: a hold lives in the process that trains, not in a file. "
    "Write sn.freeze(model) in your training script, after loading the weights."
)


class Program(click.Group):
    """A group whose commands end in one clear line, never in a traceback."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Say why the command that everybody tries first does not exist."""
        if args and args[0] in ("freeze", "unfreeze"):
            raise click.UsageError(_NO_FREEZE, ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; report what it raises."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise  # click's own ways to end
        except (Exception, KeyboardInterrupt, SystemExit) as error:  # click itself raises Exit
            ctx.exit(report(error, whole=ctx.params["traceback"]))


@click.group(
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_NO_FREEZE,
)
@click.option("--traceback", is_flag=True, help="When something fails, show all of it.")
@click.version_option(package_name="stillnorm")
def main(traceback: bool) -> None:
    """BatchNorm that holds still: see what every norm layer does, and prove what is wrong."""


for command in (inspect, check, explain, diff, recalibrate, fold, export, port, demo):
    main.add_command(command)
