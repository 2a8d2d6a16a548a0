"""Hearing of every module that is called, wherever it stands: hooks on all modules at once.

Hooks on the model itself would be missed where parts of it are compiled.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as global_hooks
from torch.utils.hooks import RemovableHandle


@contextlib.contextmanager
def visits(
    enter: Callable[[nn.Module, Any], None],
    leave: Callable[..., None],
    *,
    other_threads: bool = False,
) -> Iterator[None]:
    """Call `enter` before and `leave` after every module's forward while the block runs.

    Args:
        enter: Called with the module and its positional arguments.
        leave: Called with the module, its positional arguments and, where the forward has not
            raised, its keyword arguments, and what it returned.
        other_threads: Whether to hear of forwards in other threads too: where backward runs one
            again. What else happens there is another's.
    """
    if not other_threads:
        enter, leave = _here(enter), _here(leave)
    with contextlib.ExitStack() as registered:
        registered.callback(_remove, global_hooks.register_module_forward_pre_hook(enter))
        registered.callback(
            _remove,
            global_hooks.register_module_forward_hook(leave, with_kwargs=True, always_call=True),
        )
        yield


def _here(hook: Callable[..., None]) -> Callable[..., None]:
    """Let a hook be called in the present thread only."""
    thread = threading.get_ident()

    def called(*args: Any) -> None:
        if threading.get_ident() == thread:
            hook(*args)

    return called


def _remove(handle: RemovableHandle) -> None:
    handle.remove()
    # torch 2.13 leaves this entry behind, and torch.compile then warns of hooks for ever.
    global_hooks._global_forward_hooks_with_kwargs.pop(handle.id, None)
