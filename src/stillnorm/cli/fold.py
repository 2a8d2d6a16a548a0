"""`stillnorm fold`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stillnorm.cli import targets
from stillnorm.cli.options import TARGETS, format_option, load, show, working

if TYPE_CHECKING:
    from torch import nn

_WRITTEN = {
    ".pt2": "a program of torch.export, which runs without stillnorm and without your code",
    ".safetensors": "the tensors alone; convolutions have gained a bias",
}


@click.command("fold", epilog=TARGETS)
@click.argument("target")
@click.option(
    "--example",
    "example",
    required=True,
    metavar="TARGET",
    help="An input: a tensor, a tuple of arguments, a mapping, or what makes one.",
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
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Where to write the folded model: .pt2 or .safetensors. Without it, only what would fold "
    "is told.",
)
@click.option("--device", help="Where to put the model and the example: cuda, cuda:1.")
@format_option
def fold(
    target: str,
    example: str,
    weights: Path | None,
    forward: str | None,
    out: Path | None,
    device: str | None,
    format: str,
) -> None:
    """Fold the norm layers of a model into the convolutions beside them, for inference.

    Each fold is measured on the example, against float64; what would be off, or convolve twice,
    stays as it is and is named with the reason. The file is written whole or not at all.
    """
    if out is not None and out.suffix not in _WRITTEN:
        kinds = "; ".join(f"{suffix}, {what}" for suffix, what in _WRITTEN.items())
        raise click.UsageError(f"--out {out.name}: the ending says what to write: {kinds}")
    loaded = load(target, weights, None, None, device)
    called = None if forward is None else targets.load_function(forward, "model", "example")
    given = targets.load_data(example)
    if device is not None:
        from stillnorm.cli.device import existing, moved

        given = moved(given, existing(device))
    with working("folding"):
        from stillnorm.folding import fold as fold_model

        report = fold_model(loaded.model, given, forward=called)
    if out is not None:
        with working(f"writing {out.name}"):
            _write(report.model, given, out, called is not None)
    show(report, report.document(), format)


def _write(model: nn.Module, example: Any, out: Path, is_called_otherwise: bool) -> None:
    """Write the folded model."""
    from stillnorm.state.files import write_tensors, write_whole

    if out.suffix == ".safetensors":
        write_tensors(out, {k: t.contiguous() for k, t in model.state_dict().items()}, {})
        return
    if is_called_otherwise:
        raise click.UsageError("--out FILE.pt2 exports model(example): it cannot use --forward")
    import io
    from collections.abc import Mapping

    import torch

    args = () if isinstance(example, Mapping) else _tuple(example)
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, args, kwargs), buffer)
    write_whole(out, buffer.getvalue())


def _tuple(example: Any) -> tuple[Any, ...]:
    return tuple(example) if isinstance(example, tuple | list) else (example,)
