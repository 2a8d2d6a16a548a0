"""Calling a model on one batch, with the mistakes found before the call.

What cannot be called raises with the ``forward=`` line to copy: the user knows the model, and one
line says it all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stillnorm.errors import BatchError
from stillnorm.tracing.batches import tensors_in

Forward = Callable[[Any, Any], object]


def call(model: nn.Module, batch: object, forward: Forward | None = None) -> object:
    """Call the model on one batch and return its output.

    Args:
        model: The model.
        batch: A tensor; ``(inputs, target)``, of which the inputs are used; or a mapping, which is
            keyword arguments.
        forward: ``(model, batch) -> output``, for everything else.

    Raises:
        BatchError: The batch does not fit the model's signature, or lies on another device.

    Example:
        >>> net = nn.Linear(3, 2)
        >>> call(net, (torch.zeros(8, 3), torch.zeros(8))).shape
        torch.Size([8, 2])
    """
    if forward is not None:
        return forward(model, batch)
    signature = _signature(model)
    args, kwargs = _arguments(batch, signature)
    _check_signature(model, signature, batch, args, kwargs)
    _check_device(model, batch, args, kwargs)
    output: object = model(*args, **kwargs)
    return output


def call_example(model: nn.Module, example: object, forward: Forward | None = None) -> object:
    """Call the model on an example, which is what `torch.export` takes.

    Args:
        model: The model.
        example: A tensor, a tuple or list of positional arguments, or a mapping of keyword
            arguments.
        forward: ``(model, example) -> output``, for everything else.

    Raises:
        BatchError: The example does not fit the model's signature, or lies on another device.

    Example:
        >>> call_example(nn.Bilinear(3, 3, 2), (torch.zeros(8, 3), torch.zeros(8, 3))).shape
        torch.Size([8, 2])
    """
    if forward is not None:
        return forward(model, example)
    signature = _signature(model)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Mapping):
        kwargs = dict(example)
    elif isinstance(example, tuple | list):
        args = tuple(example)
    else:
        args = (example,)
    _check_signature(model, signature, example, args, kwargs)
    _check_device(model, example, args, kwargs)
    output: object = model(*args, **kwargs)
    return output


def _arguments(
    batch: object, signature: inspect.Signature | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return what the batch is to the model: positional and keyword arguments."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, list | tuple) and len(batch) in (1, 2) and isinstance(batch[0], Tensor):
        return (batch[0],), {}  # (inputs,) is what a DataLoader over TensorDataset(x) yields
    if type(batch).__name__ == "ndarray":
        raise BatchError(
            "a batch is a NumPy array, and the model takes tensors",
            help="torch.from_numpy(batch), of the dtype that the model has",
        )
    raise BatchError(
        f"a batch is {_describe(batch)}: unclear what of it the model takes",
        help=f"forward=lambda model, batch: model({_guess(batch, signature)})",
    )


def _signature(model: nn.Module) -> inspect.Signature | None:
    """Return the signature of the model's forward; None where it cannot be known.

    Wrappers (DistributedDataParallel, torch.compile) take anything; the model inside does not.
    """
    if isinstance(model, torch.jit.ScriptModule):
        return None
    signature = inspect.signature(model.forward)
    anything = all(
        p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()
    )
    children = dict(model.named_children())
    if anything and len(children) == 1 and {"module", "_orig_mod"} & children.keys():
        return _signature(*children.values())
    return signature


def _check_signature(
    model: nn.Module,
    signature: inspect.Signature | None,
    batch: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    """Raise when the model's forward cannot take the arguments, before it is called."""
    if signature is None:
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise BatchError(
            f"the forward of {type(model).__name__}, ({', '.join(signature.parameters)}), "
            f"cannot take a batch that is {_describe(batch)}: {error}",
            help=f"forward=lambda model, batch: model({_guess(batch, signature)})",
        ) from None


def _check_device(
    model: nn.Module, batch: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise when the whole model is on one device and an input on another: nothing is moved."""
    inputs = list(tensors_in((args, kwargs)))
    first = next(model.parameters(), None)
    if first is not None and all(tensor.device == first.device for tensor in inputs):
        return
    homes = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    away = next((tensor for tensor in inputs if tensor.device not in homes), None)
    if len(homes) != 1 or away is None:
        return
    (home,) = homes
    if isinstance(batch, Mapping):
        line = f"**{{k: v.to({str(home)!r}) for k, v in batch.items()}}"
    else:
        line = f"{'batch' if isinstance(batch, Tensor) else 'batch[0]'}.to({str(home)!r})"
    raise BatchError(
        f"the model is on {home}, the batch on {away.device}",
        help=f"forward=lambda model, batch: model({line})",
    )


def _describe(batch: object) -> str:
    """Say what a batch is, in a few words with shapes."""
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a {type(batch).__name__} with {', '.join(map(repr, batch))}"
    if isinstance(batch, list | tuple):
        parts = (
            str(tuple(b.shape)) if isinstance(b, Tensor) else type(b).__name__ for b in batch[:6]
        )
        return f"a {type(batch).__name__} of {len(batch)}: {', '.join(parts)}"
    return f"a {type(batch).__name__}"


def _guess(batch: object, signature: inspect.Signature | None) -> str:
    """Guess the arguments of the line to copy."""
    required = [
        name
        for name, parameter in (signature.parameters.items() if signature else ())
        if parameter.default is parameter.empty
        and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    if isinstance(batch, Mapping):
        accepted = [key for key in batch if signature and key in signature.parameters]
        if accepted:
            return ", ".join(f"{key}=batch[{key!r}]" for key in accepted)
        keys = [key for key, value in batch.items() if isinstance(value, Tensor)] or list(batch)
        return ", ".join(f"batch[{key!r}]" for key in keys[: max(1, len(required))])
    if isinstance(batch, list | tuple) and batch:
        if isinstance(batch[0], Mapping):
            return "**batch[0]"
        return ", ".join(f"batch[{i}]" for i in range(min(len(batch), max(1, len(required)))))
    if len(required) > 1 and isinstance(batch, Tensor):
        return ", ".join(["batch", *(f"{name}=..." for name in required[1:])])
    return "batch"
