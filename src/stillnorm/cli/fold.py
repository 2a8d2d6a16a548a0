"""`stillnorm fold`."""

from __future__ import annotations

from pathlib import Path

import click

from stillnorm.cli.example import load_with_example, on_example
from stillnorm.cli.options import TARGETS, show, working
from stillnorm.cli.weights import must_have_a_folder

_WRITTEN = {
    ".pt2": "a program of torch.export, run and compared before it takes its place",
    ".safetensors": "the tensors alone; convolutions have gained a bias",
}


@click.command("fold", epilog=TARGETS)
@click.argument("target")
@on_example
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to write the folded model: .pt2 or .safetensors. Without it, only what would fold "
    "is told.",
)
def fold(
    target: str,
    example: str | None,
    data: str | None,
    weights: Path | None,
    forward: str | None,
    device: str | None,
    out: Path | None,
    format: str,
) -> None:
    """Fold the norm layers of a model into the convolutions beside them, for inference.

    Each fold is measured on the example, against float64; what would be off, or convolve twice,
    stays as it is and is named with the reason. The file is written whole or not at all.
    """
    if out is not None and out.suffix not in _WRITTEN:
        kinds = "; ".join(f"{suffix}, {what}" for suffix, what in _WRITTEN.items())
        raise click.UsageError(f"--out {out.name}: the ending says what to write: {kinds}")
    must_have_a_folder(out)
    loaded = load_with_example(target, weights, example, data, forward, device)
    with working("folding"):
        from stillnorm.folding import fold as fold_model

        report = fold_model(loaded.model, loaded.data, forward=loaded.forward)
    if out is not None:
        with working(f"writing {out.name}"):
            if out.suffix == ".pt2":
                from stillnorm.export import export_program

                export_program(report.model, loaded.data, out, forward=loaded.forward)
            else:
                from stillnorm.state.files import write_tensors

                tensors = report.model.state_dict().items()
                write_tensors(out, {key: tensor.contiguous() for key, tensor in tensors}, {})
    show(report, report.document(), format)
