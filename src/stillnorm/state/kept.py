"""Context managers that keep one thing each: modes, hooks, buffers, gradients, random states ...

What is kept is noted when the block begins and put back when it ends, whatever raised. `modes` puts
them together.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from stillnorm.holding import remember
from stillnorm.norms import every_module, hold_of, keep_tensors, overrides_train
from stillnorm.norms.adapters.keras import is_keras


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Keep `training` of every module, and what held layers have been asked for.

    Where a class overrides `train()`, the override is called: it may have more to take back than
    the flag (LoRA layers merge their weights in eval mode and part them in train mode).
    """
    # A module frozen by TorchScript has no such flag.
    flags = [
        (module, module.training) for module in every_module(model) if hasattr(module, "training")
    ]
    holds = [(hold, hold.asked) for module, _ in flags if (hold := hold_of(module)) is not None]
    try:
        yield
    finally:
        try:
            for module, training in flags:
                if module.training != training and overrides_train(module):
                    module.train(training)
        finally:
            # The flag itself: an override sets the modes of other modules too.
            for module, training in flags:
                module.training = training
            for hold, asked in holds:
                hold.asked = asked


@contextlib.contextmanager
def layers_kept(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Keep class, hold and attributes (eps, momentum, ...) of norm layers."""
    put_back = [remember(layer) for layer in layers]
    try:
        yield
    finally:
        for undo in put_back:
            undo()


@contextlib.contextmanager
def trainable_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep `trainable` of Keras' layers and of their variables.

    Past its setter, which sets that of everything inside, and which a held layer only notes.
    """
    every: list[Any] = [module for module in modules if is_keras(module)]
    kept = [
        (one.__dict__, one.__dict__["_trainable"])
        for layer in every
        for one in (layer, *layer._trainable_variables)
        if "_trainable" in one.__dict__
    ]
    try:
        yield
    finally:
        for attributes, trainable in kept:
            attributes["_trainable"] = trainable


@contextlib.contextmanager
def lazies_kept(model: nn.Module) -> Iterator[None]:
    """Keep lazy modules lazy: a forward inside the block does not settle their sizes."""
    modules = [
        (module, module.__class__, dict(module.__dict__))
        for module in every_module(model)
        if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params()
    ]
    tensors = [
        (tensor, tensor.__class__, tensor.data)
        for tensor in (*model.parameters(), *model.buffers())
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer)
    ]
    try:
        yield
    finally:
        for module, module_class, attributes in modules:
            module.__class__ = module_class
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for tensor, tensor_class, empty in tensors:
            if tensor.__class__ is not tensor_class:
                tensor.data = empty
                tensor.__class__ = tensor_class


_HOOKS = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
_FULL = "_is_full_backward_hook"  # torch refuses to mix the two kinds of backward hook


@contextlib.contextmanager
def hooks_kept(model: nn.Module) -> Iterator[None]:
    """Keep the hooks of every module: the same dictionaries with the same hooks in order."""
    attributes = [module.__dict__ for module in every_module(model)]
    dictionaries = [
        (of_module, name, hooks, dict(hooks))
        for of_module in attributes
        for name, hooks in of_module.items()
        if name.endswith(_HOOKS) and isinstance(hooks, dict)
    ]
    full = [(of_module, of_module.get(_FULL)) for of_module in attributes]
    flags = [{k: v for k, v in d.items() if isinstance(v, bool)} for d in attributes]
    try:
        yield
    finally:
        added = any(list(hooks) != list(before) for _, _, hooks, before in dictionaries)
        for of_module, name, hooks, before in dictionaries:
            of_module[name] = hooks
            if list(hooks.items()) != list(before.items()):
                hooks.clear()
                hooks.update(before)
        for of_module, is_full in full:
            of_module[_FULL] = is_full
        if added:
            # Whoever adds hooks notes it (transformers, at its first forward): with them gone, the
            # note would be wrong, and they would never come back.
            for of_module, before_flags in zip(attributes, flags, strict=True):
                for name in [k for k, v in of_module.items() if isinstance(v, bool)]:
                    if name not in before_flags:
                        del of_module[name]
                    elif name != "training":
                        of_module[name] = before_flags[name]


@contextlib.contextmanager
def buffers_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep which tensor objects are the modules' buffers; their values are kept elsewhere.

    Some layers and tools write ``layer.running_mean = ...``, and casts replace every buffer.
    """
    kept = [
        (module._buffers, dict(module._buffers))
        for module in modules
        if isinstance(module._buffers, dict)  # TorchScript's cannot be replaced
    ]
    try:
        yield
    finally:
        for buffers, before in kept:
            same = list(buffers) == list(before) and all(buffers[n] is before[n] for n in before)
            if not same:
                buffers.clear()
                buffers.update(before)


@contextlib.contextmanager
def attributes_kept(model: nn.Module) -> Iterator[None]:
    """Keep the attributes of every module, and what lists, dicts and sets among them contain.

    For a forward that is stopped halfway: what it has noted in the model would be there still.
    """
    kept = [(module.__dict__, dict(module.__dict__)) for module in every_module(model)]
    contents: list[tuple[Any, Any]] = [
        (value, value.copy())
        for _, before in kept
        for name, value in before.items()
        if isinstance(value, list | dict | set) and name not in _OF_TORCH
    ]
    try:
        yield
    finally:
        for attributes, before in kept:
            same = attributes.keys() == before.keys()
            if not same or any(attributes[name] is not before[name] for name in before):
                attributes.clear()
                attributes.update(before)
        for value, content in contents:
            if not _holds(value, content):
                value.clear()
                value.extend(content) if isinstance(value, list) else value.update(content)


def _holds(value: Any, content: Any) -> bool:
    """Tell whether a container holds the same objects still: Keras's refuse to be filled again."""
    if isinstance(value, set):
        return bool(value == content)
    if isinstance(value, dict):
        value, content = ([part for item in x.items() for part in item] for x in (value, content))
    return len(value) == len(content) and all(map(operator.is_, value, content))


# What every module has; no forward writes there, except to buffers.
_OF_TORCH = frozenset(vars(nn.Module())) - {"_buffers"}


@contextlib.contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """Keep `requires_grad` and `.grad` of every parameter: the same tensors, with their values."""
    kept = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with keep_tensors([grad for _, _, grad in kept if grad is not None]):
        try:
            yield
        finally:
            for parameter, required, grad in kept:
                if parameter.requires_grad != required:
                    # What is made under inference_mode can be changed there only.
                    with torch.inference_mode(parameter.is_inference()):
                        parameter.requires_grad_(required)
                if parameter.grad is not grad:
                    parameter.grad = grad
