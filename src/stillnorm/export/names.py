"""What inputs and outputs are called: after the structure that the model takes and returns.

The parts of a path are joined by dots: ``{"logits": y, "aux": {"n": z}}`` gives ``logits`` and
``aux.n``. What has no name of its own is numbered: ``output.0``. A tensor alone is ``output``.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from torch.utils._pytree import tree_flatten, tree_flatten_with_path

from stillnorm.export.call import Call, Called
from stillnorm.norms.adapters.keras import is_keras


def input_names(call: Call) -> list[str]:
    """Return a name for each input of a call, as `Call.leaves` numbers them."""
    alone = len(call.args) == 1 and not call.kwargs and isinstance(call.args[0], Mapping)
    if alone or isinstance(call.module, Called):
        return unique(_joined(path, "input") for path in _paths(call.args[0]))
    module: Any = call.module
    parameters = _parameters(module.call if is_keras(module) else module.forward)
    given = [*zip(parameters, call.args, strict=False), *call.kwargs.items()]
    return unique(_joined((name, *path), name) for name, tree in given for path in _paths(tree))


def output_names(output: object) -> list[str]:
    """Return a name for each leaf of an output; a file has those that it can return."""
    return unique(_joined(path, "output") for path in _paths(output))


def unique(names: Iterable[str], taken: Collection[str] = ()) -> list[str]:
    """Return names with a number after those that come again or are taken.

    Example:
        >>> unique(["x", "y", "y"], taken=["x"])
        ['x_1', 'y', 'y_1']
    """
    wished = list(names)
    used, found = {*taken}, list[str]()
    for name in wished:
        numbered = (f"{name}_{n}" for n in itertools.count(1))
        free = (other for other in numbered if other not in used and other not in wished)
        found.append(name if name not in used else next(free))
        used.add(found[-1])
    return found


def _joined(path: tuple[str, ...], root: str) -> str:
    """Write a path as a name; one that begins with a number, or with nothing, gets a root."""
    whole = path if path and not path[0].isdigit() else (root, *path)
    return ".".join(re.sub(r"[^\w.-]+", "_", part) or "_" for part in whole)


def _paths(tree: object) -> Iterator[tuple[str, ...]]:
    """Yield the path to each leaf, in the order of torch's flattening."""
    children, _ = tree_flatten(tree, is_leaf=lambda part: part is not tree)
    if len(children) == 1 and children[0] is tree:
        yield ()
        return
    for key, child in zip(_keys(tree, children), children, strict=True):
        yield from ((key, *path) for path in _paths(child))


def _keys(tree: object, children: list[object]) -> list[str]:
    """Return what the parts of a container are called."""
    try:
        entries, _ = tree_flatten_with_path(tree, is_leaf=lambda part: part is not tree)
    except ValueError:  # its class is known to torch without keys, as those of transformers are
        if isinstance(tree, Mapping) and len(tree) == len(children):
            return [_text(key) for key in tree]
        return [str(n) for n in range(len(children))]
    return [_key(path[0]) for path, _ in entries]


def _key(entry: Any) -> str:
    """Return the key of a mapping, the name of an attribute, the index of an item."""
    kinds = ("key", "name", "idx")
    return _text(next(getattr(entry, kind) for kind in kinds if hasattr(entry, kind)))


def _text(key: object) -> str:
    """Return a key as text: of an enumeration of texts the one that finds it in the mapping."""
    return str.__str__(key) if isinstance(key, str) else str(key)


def _parameters(function: Callable[..., object]) -> Iterator[str]:
    """Yield the names of a function's parameters; ``*args`` are numbered without end."""
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            yield from (f"{parameter.name}.{n}" for n in itertools.count())
        yield parameter.name
    yield from (f"input.{n}" for n in itertools.count())
