"""`stillnorm export`."""

from __future__ import annotations

from pathlib import Path

import click

from stillnorm.cli.example import load_with_example, on_example
from stillnorm.cli.options import TARGETS, show, working
from stillnorm.cli.weights import must_have_a_folder

_WRITTEN = {
    ".onnx": "an ONNX graph, run in onnxruntime before it takes its place",
    ".pt2": "a program of torch.export, which runs without stillnorm and without your code",
}


@click.command("export", epilog=TARGETS)
@click.argument("target")
@on_example
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to write: .onnx or .pt2.",
)
@click.option(
    "--fixed-batch", is_flag=True, help="Export for the batch size of the example, and no other."
)
def export(
    target: str,
    example: str | None,
    data: str | None,
    out: Path,
    weights: Path | None,
    forward: str | None,
    fixed_batch: bool,
    device: str | None,
    format: str,
) -> None:
    """Export what a model computes in eval mode, and prove that the file computes it.

    The file is run on the example and on its samples in other batch sizes, and compared with the
    model. A model whose eval output depends on the batch, or whose statistics are broken, is
    refused with the finding. Statistics that are initial or stale are named and exported as they
    are. The file is written whole or not at all.
    """
    if out.suffix not in _WRITTEN:
        kinds = "; ".join(f"{suffix}, {what}" for suffix, what in _WRITTEN.items())
        raise click.UsageError(f"--out {out.name}: the ending says what to write: {kinds}")
    must_have_a_folder(out)
    loaded = load_with_example(target, weights, example, data, forward, device)
    with working(f"exporting to {out.name}"):
        from stillnorm.export import export_onnx, export_program

        write = export_onnx if out.suffix == ".onnx" else export_program
        report = write(
            loaded.model, loaded.data, out, forward=loaded.forward, dynamic=not fixed_batch
        )
    show(report, report.document(), format)
