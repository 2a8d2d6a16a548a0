"""`stillnorm check`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from stillnorm.cli import targets
from stillnorm.cli.config import FAIL_ON, Config, configured
from stillnorm.cli.failures import FINDINGS, INTERNAL
from stillnorm.cli.fixing import fixed, write_model
from stillnorm.cli.options import FILES, Loaded, format_of, load, on_model, working
from stillnorm.cli.weights import few, must_be_tensors, must_have_a_folder
from stillnorm.cli.written import FORMATS, form_of, must_not_replace, write_report
from stillnorm.errors import TargetError
from stillnorm.reports.numbers import count

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from stillnorm.diagnosis import Report
    from stillnorm.diagnosis.baseline import Baseline

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("check", epilog=FILES)
@partial(on_model, needs_data=False, format=format_of(*FORMATS))
@click.option(
    "--score",
    metavar="TARGET",
    help="A function (output, batch) -> number, higher is better: your own metric.",
)
@click.option(
    "--predict",
    metavar="TARGET",
    help="A function (model, batch) -> output: how you infer, modes and all.",
)
@click.option(
    "--train-step",
    metavar="TARGET",
    help="A function (model, batch), or (model, batch, optimizer): one step of your training.",
)
@click.option(
    "--optimizer", metavar="TARGET", help="A function (model) -> the optimizer that trains it."
)
@click.option(
    "--max-batches",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="How many batches are read.",
)
@click.option("--select", metavar="RULES", help="Only these: codes, their beginnings, or slugs.")
@click.option("--extend-select", metavar="RULES", help="These too: preview rules, for instance.")
@click.option("--ignore", metavar="RULES", help="Not these; several with commas between.")
@click.option("--fix", is_flag=True, help="Apply the safe fixes, and check again.")
@click.option("--unsafe-fixes", is_flag=True, help="With --fix: the unsafe ones too.")
@click.option(
    "--out",
    type=_FILE,
    metavar="FILE",
    help="With --fix: where to write the fixed model's tensors: .safetensors.",
)
@click.option(
    "--baseline", type=_FILE, metavar="FILE", help="Known faults, which are not reported."
)
@click.option(
    "--write-baseline",
    type=_FILE,
    metavar="FILE",
    help="Write what is found now as known faults; only others are reported.",
)
@click.option(
    "--output",
    "outputs",
    type=_FILE,
    multiple=True,
    metavar="FILE",
    help="Write the report into a file; its ending says how: .html, .json, .md, .txt. Can be "
    "given several times.",
)
@click.option(
    "--config",
    type=_FILE,
    metavar="FILE",
    is_eager=True,
    callback=configured,
    help="A TOML file with [tool.stillnorm]; by default the nearest pyproject.toml that has one.",
)
@click.option(
    "--fail-on",
    type=click.Choice(FAIL_ON),
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
    predict: str | None,
    train_step: str | None,
    optimizer: str | None,
    max_batches: int,
    select: str | None,
    extend_select: str | None,
    ignore: str | None,
    fix: bool,
    unsafe_fixes: bool,
    out: Path | None,
    baseline: Path | None,
    write_baseline: Path | None,
    outputs: tuple[Path, ...],
    config: Config,
    fail_on: Literal["error", "warning", "info", "never"],
    verbose: bool,
) -> None:
    """Find what is wrong with a model's norm layers.

    Without --data the rules that need no data run. With it, each layer's statistics are compared
    with what it receives; with --score too, what that costs is said in your own unit.

    Options have defaults in [tool.stillnorm] of pyproject.toml, per-path-ignores too.

    Exit codes: 0 clean, 1 findings (--fail-on), 2 bad usage or unreadable input, 3 a bug of ours.
    """
    for option, given in (("score", score), ("predict", predict), ("train-step", train_step)):
        if given is not None and data is None:
            raise click.UsageError(f"--{option} needs --data")
    for option, asked in (("unsafe-fixes", unsafe_fixes), ("out", out is not None)):
        if asked and not fix:
            raise click.UsageError(f"--{option} needs --fix")
    if out is not None and out.suffix != ".safetensors":
        raise click.UsageError(f"--out {out.name}: the file is written as .safetensors only")
    if write_baseline is not None and fix:
        raise click.UsageError("--write-baseline and --fix: first the one, then the other")
    must_have_a_folder(out)
    must_have_a_folder(write_baseline, "--write-baseline")
    for file in outputs:
        must_have_a_folder(file, "--output")
        form_of(file, format)
    inputs = (target, data, forward, score, predict, train_step, optimizer, weights, config.file)
    must_not_replace(outputs, (*inputs, out, baseline, write_baseline))

    known = _known(baseline, write_baseline)
    scorer = _function(score, "output", "batch")
    predictor = _function(predict, "model", "batch")
    step = _function(train_step, "model", "batch", also=("optimizer",))
    make_optimizer = _function(optimizer, "model")
    if extend_select is not None:
        select = f"{select or 'DEFAULT'},{extend_select}"

    def look() -> Report:
        with working("checking"):
            from stillnorm.diagnosis import check as examine
            from stillnorm.diagnosis.suppression import ignoring

            report = examine(
                loaded.file or loaded.model,
                loaded.data,
                forward=loaded.forward,
                score=scorer,
                predict=predictor,
                train_step=step,
                optimizer=_optimizer(make_optimizer, loaded.model, optimizer),
                max_batches=min(max_batches, sys.maxsize),
                select=select,
                ignore=ignore,
            )
            return ignoring(report, config.ignored(), by=config.name)

    loaded = _readable_twice(load(target, weights, data, forward, device, files=True), max_batches)
    if fix and loaded.file is not None:
        raise click.UsageError(f"--fix needs a model: {loaded.file.name} is a file")
    with working("reading the model's state"):
        state = loaded.model.state_dict()
    keys = list(state)
    if out is not None:
        must_be_tensors(state)
    report = look()
    if write_baseline is not None and known is not None:
        known = known.updated(report)
        known.write(write_baseline)
        click.echo(f"the baseline: {write_baseline}", err=True)
    report = _without(report, known)
    if fix:
        report = fixed(report, lambda: _without(look(), known), unsafe=unsafe_fixes)
    write_report(report, format=format, files=outputs, verbose=verbose)
    if known is not None and (gone := known.gone(report)):
        _say_gone(gone, write_baseline or baseline)
    if out is not None:
        write_model(loaded.model, keys, report, out)
    elif fix and report.fixed:
        click.echo("nothing is written: --out FILE.safetensors keeps the fixed model", err=True)
    if fail_on != "never" and any(finding.at_least(fail_on) for finding in report.findings):
        ctx.exit(FINDINGS)
    if report.crashed:
        ctx.exit(INTERNAL)


def _function(target: str | None, *takes: str, also: tuple[str, ...] = ()) -> Any:
    if target is None:
        return None
    with working(f"loading {target}"):
        return targets.load_function(target, *takes, also=also)


def _optimizer(
    factory: Callable[[nn.Module], object] | None, model: nn.Module, target: str | None
) -> Optimizer | None:
    """Make the optimizer, anew for each look: a fix may have changed the parameters."""
    if factory is None:
        return None
    from torch.optim import Optimizer

    made = factory(model)
    if not isinstance(made, Optimizer):
        raise TargetError(
            f"{target} returns {type(made).__name__}, not a torch.optim.Optimizer",
            help="write a function (model) -> the optimizer",
        )
    return made


def _readable_twice(loaded: Loaded, max_batches: int) -> Loaded:
    """Keep the batches of an iterator, which can be read once only."""
    if not isinstance(loaded.data, Iterator):
        return loaded
    with working("reading the batches"):
        return replace(loaded, data=list(islice(loaded.data, min(max_batches, sys.maxsize))))


def _known(baseline: Path | None, write_baseline: Path | None) -> Baseline | None:
    """Read the baseline; to write one, what it has of other rules and models is kept."""
    from stillnorm.diagnosis.baseline import Baseline

    if write_baseline is not None:
        exists = write_baseline.exists()
        return Baseline.read(write_baseline) if exists else Baseline(write_baseline.name, {})
    return None if baseline is None else Baseline.read(baseline)


def _without(report: Report, known: Baseline | None) -> Report:
    return report if known is None else known.hidden(report)


def _say_gone(gone: list[tuple[str, str]], baseline: Path | None) -> None:
    """Say on stderr that the baseline accepts more than there is."""
    some = few(f"{code} {path}" for code, path in gone)
    click.echo(
        f"{baseline}: {count(len(gone), 'fault')} of it {'is' if len(gone) == 1 else 'are'} gone "
        f"({some})\n  help: --write-baseline {baseline} takes them out",
        err=True,
    )
