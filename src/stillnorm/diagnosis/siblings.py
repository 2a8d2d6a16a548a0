"""Collapsing siblings: ``layer1.0.bn1``, ``layer1.0.bn2``, ... as ``layer1.*.bn1..2``.

Siblings are items that are alike and whose paths differ in nothing but the numbers at the ends of
their components. How far numbers may differ depends on how many rows there would be: a small model
shows every layer, a larger one every stage, a very large one only what kinds of layer it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")

_FEW = 10  # so many items stand alone
_MANY = 20  # more rows than these, and stages collapse too
_NUMBERED = re.compile(r"(.*?)(\d*)")


def collapse(
    items: Sequence[T], path: Callable[[T], str], alike: Callable[[T], Hashable]
) -> tuple[tuple[str, tuple[T, ...]], ...]:
    """Group siblings that are alike.

    Args:
        items: What to group, in the order of the rows.
        path: The path of an item.
        alike: What two items must have in common beside the shape of their paths.

    Returns:
        (pattern, members) of every group, in order of the first members.

    Example:
        >>> names = [f"layer{i}.{j}.bn{k}" for i in (1, 2) for j in (0, 1) for k in (1, 2, 3)]
        >>> [row[0] for row in collapse(names, path=str, alike=lambda name: 0)]
        ['layer1.*.bn1..3', 'layer2.*.bn1..3']
    """
    if len(items) <= _FEW:
        return tuple((path(item), (item,)) for item in items)
    rows = _groups(items, path, alike, literal=1)
    if len(rows) > _MANY:
        rows = _groups(items, path, alike, literal=0)
    return tuple((_pattern([path(item) for item in row]), tuple(row)) for row in rows)


def _groups(
    items: Sequence[T],
    path: Callable[[T], str],
    alike: Callable[[T], Hashable],
    literal: int,
) -> list[list[T]]:
    """Group by the path's shape, in which the first `literal` numbers still count."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault((_shape(path(item), literal), alike(item)), []).append(item)
    return list(groups.values())


def _split(component: str) -> tuple[str, str]:
    """Split ``bn12`` into ``bn`` and ``12``."""
    match = _NUMBERED.fullmatch(component)
    return (match[1], match[2]) if match else (component, "")


def _shape(path: str, literal: int) -> tuple[str, ...]:
    shape = []
    for component in path.split("."):
        stem, digits = _split(component)
        if digits and literal > 0:
            literal -= 1
            shape.append(component)
        else:
            shape.append(f"{stem}*" if digits else component)
    return tuple(shape)


def _pattern(paths: list[str]) -> str:
    """Write paths of one shape as one: numbers that differ become a range or a star."""
    columns = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(_component(sorted(set(column))) for column in columns)


def _component(values: list[str]) -> str:
    if len(values) == 1:
        return values[0]
    stem = _split(values[0])[0]
    numbers = sorted(int(_split(value)[1]) for value in values)
    if stem and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{stem}{numbers[0]}..{numbers[-1]}"
    return f"{stem}*"
