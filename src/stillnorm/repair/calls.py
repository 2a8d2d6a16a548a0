"""Which norms are called how often in a forward, and by whom."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from stillnorm.norms import NormLayer, walk
from stillnorm.tracing import Site, calling_site, visits


@dataclass(frozen=True, eq=False)
class Place:
    """One registration of a module.

    Args:
        path: Its path.
        parent: The module it is registered in.
        name: Its name there.
    """

    path: str
    parent: nn.Module
    name: str


def places_of(model: nn.Module, layer: NormLayer) -> tuple[Place, ...]:
    """Return every registration of a layer; a parent with several paths counts once."""
    found: dict[tuple[int, str], Place] = {}
    for path, module, ancestors in walk(model):
        if module is layer.module and ancestors:
            parent, last = ancestors[-1], path.split(".")[-1]
            names = [name for name, child in parent._modules.items() if child is module]
            name = last if last in names else names[0]  # a wrapper's name is not in the path
            found.setdefault((id(parent), name), Place(path, parent, name))
    return tuple(found.values())


@dataclass
class Calls:
    """The calls of one module in a forward.

    Args:
        count: How many there are.
        stack: The calls of modules that enclose all of them, from the root: (number, module).
        sites: The user's lines.
        recursive: Modules that were called while they were running.
    """

    count: int
    stack: list[tuple[int, nn.Module]]
    sites: list[Site | None]
    recursive: set[nn.Module] = field(default_factory=set, repr=False)

    @property
    def is_recursive(self) -> bool:
        """Whether the owner calls itself."""
        return self.owner in self.recursive

    @property
    def owner(self) -> nn.Module | None:
        """The smallest module whose forward encloses all of them; None where none does."""
        return self.stack[-1][1] if self.stack else None


class CallCounter:
    """Counts the calls of modules while a block runs."""

    def __init__(self, modules: Collection[nn.Module]) -> None:
        self.calls: dict[nn.Module, Calls] = {}
        self.recursive: set[nn.Module] = set()
        self._modules = set(modules)
        self._running: list[tuple[int, nn.Module]] = []
        self._number = 0

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count while the block runs."""
        self._running.clear()
        with visits(self._enter, self._leave):
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module in self._modules:
            site = calling_site()
            before = self.calls.get(module)
            if before is None:
                self.calls[module] = Calls(1, list(self._running), [site], self.recursive)
            else:
                before.count += 1
                before.sites.append(site)
                before.stack = [
                    a for a, b in zip(before.stack, self._running, strict=False) if a == b
                ]
        if any(running is module for _, running in self._running):
            self.recursive.add(module)
        self._number += 1
        self._running.append((self._number, module))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._running and self._running[-1][1] is module:
            self._running.pop()
