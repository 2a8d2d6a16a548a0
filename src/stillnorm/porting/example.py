"""The input on which two models are compared, as either of them takes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from stillnorm.errors import PortError
from stillnorm.porting.keras.parts import KerasPart
from stillnorm.porting.keras.running import cause, inputs_of

_ANOTHER = "give real samples, or torch.randn of that shape"


@contextmanager
def taken(side: str, help: str) -> Iterator[None]:
    """Say which model does not take the example, whatever it raises."""
    try:
        yield
    except Exception as error:
        raise PortError(
            f"the {side} model does not take the example: {cause(error)}", help=help
        ) from error


def must_be_numbers(example: object) -> None:
    """Raise for an input of zeros, on which most layers do the same, or with NaN in it.

    Raises:
        PortError: Every number with a fraction in it is 0, or one is NaN.
    """
    inputs = [x for x in inputs_of(example) if x.is_floating_point()]
    if any(bool(x.isnan().any()) for x in inputs):
        raise PortError("the example has NaN in it, which proves nothing", help=_ANOTHER)
    if inputs and not any(bool(x.any()) for x in inputs):
        raise PortError("the example is 0 everywhere, which proves nothing", help=_ANOTHER)


def must_not_be_constant(example: object, outputs: Sequence[Tensor]) -> None:
    """Raise where the outputs are one number, or none: any network with that one would agree.

    One output alone, or the same samples, give one number rightly, unless it is 0.

    Raises:
        PortError: They are.
    """
    flat = [y.flatten() for y in outputs if y.numel()]
    if not any(bool(y.isfinite().any()) for y in flat):
        what = "not finite anywhere" if flat else "no tensors"
        raise PortError(f"the outputs are {what}, which proves nothing", help=_ANOTHER)
    if any(bool((y != y[0]).any()) for y in flat):
        return
    value = next((y[0].item() for y in flat if y[0] != 0), 0)
    alone = all(len(y) == 1 for y in flat)
    one_each = alone or all(y.numel() == len(y) for y in outputs if y.ndim)
    if value != 0 and one_each and (alone or not _samples_differ(example)):
        return
    raise PortError(
        f"the outputs are {value:.3g} everywhere on the example, which proves nothing",
        help=f"{_ANOTHER}; compare models without what flattens them: a last ReLU, a softmax of 1",
    )


def _samples_differ(example: object) -> bool:
    return any(bool((x != x[:1]).any()) for x in inputs_of(example) if x.ndim)


def is_channels_last(part: KerasPart) -> bool:
    """Tell whether a Keras layer has its channels on the last axis of a map."""
    layer = part.layer
    if part.geometry.kind != "batch norm":
        return getattr(layer, "data_format", None) == "channels_last"
    rank = layer.input_spec.ndim
    return bool(rank > 2 and layer.axis % rank == rank - 1)


def as_input(value: Tensor, like: Tensor) -> Tensor:
    """Give an input the device of the parameters, and their dtype, as Keras does."""
    return value.to(like if value.is_floating_point() else like.device)


def moved(value: Tensor, last: bool) -> Tensor:
    """Move the channels of a map to axis 1."""
    is_map = last and value.ndim > 2 and value.is_floating_point()
    return value.movedim(-1, 1).contiguous() if is_map else value


def each(example: object, change: Any) -> Any:
    """Change every input: alone, in a tuple or list, or by name."""
    if isinstance(example, Mapping):
        return {key: change(value) for key, value in example.items()}
    if isinstance(example, tuple | list):
        return tuple(map(change, example))
    return change(example)
