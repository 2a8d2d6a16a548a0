"""Paths of modules: the dotted names of `named_modules()` without the components of wrappers.

DistributedDataParallel, torch.compile, activation checkpointing and FSDP put the user's model under
a child of their own; the user's names for the layers must not change with them.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stillnorm.errors import ModelError
from stillnorm.norms.adapters import keras

_ALWAYS_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})


def clean_path(name: str) -> str:
    """Drop the wrapper components from a name of a state dict or of `named_modules()`.

    ``module`` counts as a wrapper at the front only, where DistributedDataParallel puts it: inside
    a name it may be the user's own.

    Example:
        >>> clean_path("module._orig_mod.backbone.bn1")
        'backbone.bn1'
    """
    parts = without_wrappers(name)
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def without_wrappers(name: str) -> list[str]:
    """Split a name, without the components that can only be a wrapper's."""
    return [part for part in name.split(".") if part not in _ALWAYS_WRAPPERS]


def must_be_a_model(model: object) -> None:
    """Raise unless it is a model of torch's.

    Raises:
        ModelError: It is something else.
    """
    if isinstance(model, nn.Module):
        return
    fact = f"a {type(model).__name__} is no torch.nn.Module"
    if any(kind.__module__.partition(".")[0] == "keras" for kind in type(model).__mro__):
        raise ModelError(
            fact,
            help="a Keras model is one on the torch backend (KERAS_BACKEND=torch); on any backend "
            "sn.port.from_keras(keras_model, model) gives its weights to a model of torch's",
        )
    raise ModelError(fact, help="give the model itself, as the first argument")


def walk(
    model: nn.Module,
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """Yield every registration of every module as (path, module, ancestors from the root).

    A module registered under two names comes twice. A child called ``module`` is a wrapper's, and
    its name is left out, below DistributedDataParallel and where it is the only child at the front.
    """
    must_be_a_model(model)
    yield from _walk(model, (), ())


def every_module(model: nn.Module) -> list[nn.Module]:
    """Return every module once: those of `model.modules()`, and those that Keras keeps in lists."""
    must_be_a_model(model)
    modules = list(model.modules())
    if any(map(keras.is_keras, modules)):
        modules = list(dict.fromkeys((*modules, *(module for _, module, _ in walk(model)))))
    return modules


def _walk(
    module: nn.Module, parts: tuple[str, ...], ancestors: tuple[nn.Module, ...]
) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    yield ".".join(parts), module, ancestors
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if keras.is_keras(module):
        children = keras.children(module)
    for name, child in children:
        wraps = name in _ALWAYS_WRAPPERS or (
            name == "module"
            and (
                isinstance(module, DataParallel | DistributedDataParallel)
                or (not parts and len(children) == 1)
            )
        )
        yield from _walk(child, parts if wraps else (*parts, name), (*ancestors, module))
