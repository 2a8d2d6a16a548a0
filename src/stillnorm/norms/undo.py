"""Undoing what foreign code does to tensors and random states, whatever it does.

The code is a user's: a `train()` that merges weights, or draws random numbers. Nothing is copied
unless it is written.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_version_kept = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C wait until the block has ended: one that puts things back is not left halfway.

    Signals reach the main thread alone; elsewhere there is nothing to do.
    """
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[Any] = []
    signal.signal(signal.SIGINT, lambda *given: waiting.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            handler(*waiting[0])


@contextlib.contextmanager
def writes_undone(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Undo every write to a tensor that the block makes.

    In-place operators are undone on any tensor, with the version counter; ``tensor.data = ...`` on
    `tensors`. Writes past torch (through NumPy) are not seen.

    Cost:
        A copy of what is written.
    """
    data = [
        (tensor, tensor.data)
        for tensor in tensors
        if not isinstance(tensor, UninitializedParameter | UninitializedBuffer)
    ]
    with contextlib.ExitStack() as versions:
        writes = _CopyBeforeWrite(versions)
        try:
            with writes:
                yield
        finally:
            for storage, before in writes.storages.values():
                storage.copy_(before)
            for tensor, was in data:
                if tensor.data_ptr() != was.data_ptr() or tensor.dtype != was.dtype:
                    tensor.data = was


class _CopyBeforeWrite(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Copies the storage of every tensor that an operator is about to write, once."""

    def __init__(self, versions: contextlib.ExitStack) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.versions = versions
        self.storages: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        given = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(given.get(argument.name)):
                    if isinstance(tensor, Tensor) and not tensor.is_meta:
                        self._note(tensor)
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages:
            copy = storage.clone()  # type: ignore[no-untyped-call]
            self.storages[storage.data_ptr()] = storage, copy
        if not tensor.is_inference():
            self.versions.enter_context(_version_kept(tensor))


@contextlib.contextmanager
def random_kept() -> Iterator[None]:
    """Keep the random states of torch (CPU, and CUDA in use), Python and, where loaded, NumPy."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=list(cuda)):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
