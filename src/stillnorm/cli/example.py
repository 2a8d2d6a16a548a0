"""What commands that run a model once, on an example, have in common: options and loading."""

from __future__ import annotations

from pathlib import Path

import click

from stillnorm.cli import targets
from stillnorm.cli.options import F, Loaded, format_option, load, weights_option


def on_example(command: F) -> F:
    """Add what goes with the target of a command that runs a model once, on an example."""
    for option in reversed(
        (
            click.option(
                "--example",
                metavar="TARGET",
                help="An input: a tensor, a tuple of arguments, a mapping, or what makes one.",
            ),
            click.option(
                "--data",
                metavar="TARGET",
                help="Instead of it batches, as other commands take them: the first one's inputs "
                "are it.",
            ),
            weights_option,
            click.option(
                "--forward",
                metavar="TARGET",
                help="A function (model, example) -> output, where model(example) is not the call.",
            ),
            click.option("--device", help="Where to put the model and the example: cuda, cuda:1."),
            format_option,
        )
    ):
        command = option(command)
    return command


def load_with_example(
    target: str,
    weights: Path | None,
    example: str | None,
    data: str | None,
    forward: str | None,
    device: str | None,
) -> Loaded:
    """Load a model and an example of its input, which is the `data`, and put them on the device."""
    if (example is None) == (data is None):
        raise click.UsageError("give an input: --example TARGET or --data TARGET")
    model = load(target, weights, None, None, device).model
    called = None if forward is None else targets.load_function(forward, "model", "example")
    given = _first(data or "", called is None) if example is None else targets.load_data(example)
    if device is not None:
        from stillnorm.cli.device import existing, moved

        given = moved(given, existing(device))
    return Loaded(model, given, called)


def _first(data: str, inputs_only: bool) -> object:
    """Return the first batch; of ``(inputs, target)`` what the model takes."""
    from stillnorm.errors import BatchError
    from stillnorm.tracing import each_batch

    batch = next(each_batch(targets.load_data(data)), None)
    if batch is None:
        raise BatchError(f"there is no batch in {data}", help="one is enough")
    return batch[0] if inputs_only and isinstance(batch, tuple | list) else batch
