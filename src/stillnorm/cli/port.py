"""`stillnorm port`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillnorm.cli import targets
from stillnorm.cli.options import TARGETS, format_of, format_option, load, show, working
from stillnorm.cli.weights import must_be_tensors, must_have_a_folder
from stillnorm.errors import FileFormatError

if TYPE_CHECKING:
    from stillnorm.porting import PortReport


@click.group("port")
def port() -> None:
    """Port models between Keras 3 and PyTorch; what differs between the frameworks.

    From Keras to PyTorch here. Back is sn.port.to_keras(model, keras_model) in Python: what comes
    of it is a Keras model in your process, which its own save() writes.
    """


@port.command("table")
@format_of("text", "json", "html")
def table(format: str) -> None:
    """Tell what batch norm and dropout are in PyTorch, Keras 3, TensorFlow 1 and Flax.

    Momentum, eps, the axis, the variance that is kept, what freezes, where statistics live: each
    with what goes wrong when it is overlooked, and with sources.
    """
    from stillnorm.porting import table as differences

    told = differences()
    if format == "html":
        click.echo(told.to_html())
    else:
        show(told, told.document(), format)


@port.command("from-keras", epilog=TARGETS)
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE.keras")
@click.argument("target")
@click.option(
    "--example",
    metavar="TARGET",
    help="An input of the Keras model: both models are run on it and must agree.",
)
@click.option(
    "--names",
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help='A map of names of Keras layers to paths in the model, {"conv1": "stem.conv"}.',
)
@click.option(
    "--count",
    type=click.IntRange(2),
    metavar="N",
    help="The number of values in each channel of a training batch: the variance becomes the "
    "unbiased one, as torch keeps it.",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Where to write the model's tensors: .safetensors. Without it, what would be ported is "
    "told. eps, momentum and holds are in no tensor: the report says which to write in the code.",
)
@format_option
def from_keras(
    file: Path,
    target: str,
    example: str | None,
    names: Path | None,
    count: int | None,
    out: Path | None,
    format: str,
) -> None:
    """Give a torch model the weights of a Keras model.

    FILE.keras is what model.save("FILE.keras") writes in Keras 3; no code in it is run. TARGET
    makes the same network in torch. All layers are ported or none; the file is written whole or not
    at all.
    """
    if out is not None and out.suffix != ".safetensors":
        raise click.UsageError(f"--out {out.name}: the file is written as .safetensors only")
    must_have_a_folder(out)
    loaded = load(target, None, None, None, None)
    given = None if example is None else targets.load_data(example)
    mapped = None if names is None else _names(names)
    if out is not None:
        must_be_tensors(loaded.model.state_dict())
    with working(f"porting {file.name}"):
        from stillnorm.porting import from_keras as ported
        from stillnorm.porting import read_keras

        report = ported(read_keras(file), loaded.model, names=mapped, count=count, example=given)
    if out is not None:
        with working(f"writing {out.name}"):
            from stillnorm.state.files import write_tensors

            write_tensors(out, loaded.model.state_dict(), _metadata(report))
    show(report, report.document(), format)
    if out is None:
        click.echo("nothing is written: --out FILE.safetensors keeps the weights", err=True)
        return
    click.echo(f"the tensors of the model with these weights: {out}", err=True)
    for line in report.unwritten():
        click.echo(line, err=True)
    if report.unwritten():
        click.echo(f"until then {out.name} loaded into {target} is another model", err=True)


def _metadata(report: PortReport) -> dict[str, str]:
    """Return the settings that are in no tensor, to be read by people."""
    settings = {
        one.path: {it.name: it.after for it in one.settings}
        for one in report.ported
        if one.settings
    }
    return {"stillnorm.port": json.dumps(settings)} if settings else {}


def _names(file: Path) -> dict[str, str]:
    """Read a map of names."""
    try:
        names = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{file.name} cannot be read: {error}") from None
    if not isinstance(names, dict) or not all(isinstance(path, str) for path in names.values()):
        raise FileFormatError(
            f"{file.name} is no map of names to paths", help='{"conv1": "stem.conv", ...}'
        )
    return names
