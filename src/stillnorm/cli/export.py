"""`stillnorm export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from stillnorm.cli import targets
from stillnorm.cli.options import TARGETS, format_option, load, show, working
from stillnorm.cli.weights import must_have_a_folder

_WRITTEN = {
    ".onnx": "an ONNX graph, run in onnxruntime before it takes its place",
    ".pt2": "a program of torch.export, which runs without stillnorm and without your code",
}


@click.command("export", epilog=TARGETS)
@click.argument("target")
@click.option(
    "--example",
    metavar="TARGET",
    help="An input: a tensor, a tuple of arguments, a mapping, or what makes one.",
)
@click.option(
    "--data",
    metavar="TARGET",
    help="Instead of it batches, as other commands take them: the first one's inputs are it.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to write: .onnx or .pt2.",
)
@click.option(
    "--weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A checkpoint to load into the model: .safetensors, .pt, .pth, .ckpt, .bin.",
)
@click.option(
    "--forward",
    metavar="TARGET",
    help="A function (model, example) -> output, where model(example) is not the call.",
)
@click.option(
    "--fixed-batch", is_flag=True, help="Export for the batch size of the example, and no other."
)
@click.option("--device", help="Where to put the model and the example: cuda, cuda:1.")
@format_option
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
    refused with the finding. The file is written whole or not at all.
    """
    if out.suffix not in _WRITTEN:
        kinds = "; ".join(f"{suffix}, {what}" for suffix, what in _WRITTEN.items())
        raise click.UsageError(f"--out {out.name}: the ending says what to write: {kinds}")
    must_have_a_folder(out)
    if (example is None) == (data is None):
        raise click.UsageError("give an input: --example TARGET or --data TARGET")
    loaded = load(target, weights, None, None, device)
    called = None if forward is None else targets.load_function(forward, "model", "example")
    given = _first(data, called is None) if example is None else targets.load_data(example)
    if device is not None:
        from stillnorm.cli.device import existing, moved

        given = moved(given, existing(device))
    with working(f"exporting to {out.name}"):
        from stillnorm.export import export_onnx, export_program

        write = export_onnx if out.suffix == ".onnx" else export_program
        report = write(loaded.model, given, out, forward=called, dynamic=not fixed_batch)
    show(report, report.document(), format)


def _first(data: str | None, inputs_only: bool) -> Any:
    """Return the first batch; of ``(inputs, target)`` what the model takes."""
    from stillnorm.errors import BatchError
    from stillnorm.tracing import each_batch

    batch = next(each_batch(targets.load_data(data or "")), None)
    if batch is None:
        raise BatchError(f"there is no batch in {data}", help="one is enough")
    return batch[0] if inputs_only and isinstance(batch, tuple | list) else batch
