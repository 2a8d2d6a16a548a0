"""Collapsing siblings: ``layer1.0.bn1``, ``layer1.0.bn2``, ... as ``layer1.*.bn1..2``.

Siblings are items that are alike and whose paths differ in nothing but their numbers. Which numbers
may differ depends on how many rows there would be: a small model shows every layer, a larger one
every stage, a very large one only what kinds of layer it has.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")

_FEW = 10  # so many items stand alone
_MANY = 20  # more rows than these, and the next level is tried
_ENDS_IN_NUMBER = re.compile(r"(.*?)(\d+)")  # bn1, layer12, 3
_FROM_FIRST_DIGIT = re.compile(r"(\D*)(\d.*)")  # Mixed_5b, branch3x3dbl_2

# From fine to coarse: what counts as a number, and how many of a path's numbers still tell
# siblings apart.
_LEVELS = ((_ENDS_IN_NUMBER, 1), (_ENDS_IN_NUMBER, 0), (_FROM_FIRST_DIGIT, 0))


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
    rows: list[list[T]] = [[item] for item in items]
    if len(items) > _FEW:
        for number, literal in _LEVELS:
            groups: dict[Hashable, list[T]] = {}
            for item in items:
                key = _shape(path(item), number, literal), alike(item)
                groups.setdefault(key, []).append(item)
            rows = list(groups.values())
            if len(rows) <= _MANY:
                break
    return tuple((_pattern([path(item) for item in row]), tuple(row)) for row in rows)


def _shape(path: str, number: re.Pattern[str], literal: int) -> tuple[str, ...]:
    """Put a star for each number after the first `literal` ones."""
    shape = []
    for component in path.split("."):
        match = number.fullmatch(component)
        if match and literal > 0:
            literal -= 1
            shape.append(component)
        else:
            shape.append(f"{match[1]}*" if match else component)
    return tuple(shape)


def _pattern(paths: list[str]) -> str:
    """Write paths of one shape as one: numbers that differ become a range or a star."""
    columns = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(_component(sorted(set(column))) for column in columns)


def _component(values: list[str]) -> str:
    if len(values) == 1:
        return values[0]
    matches = [match for value in values if (match := _ENDS_IN_NUMBER.fullmatch(value))]
    stems = {match[1] for match in matches}
    if len(matches) < len(values) or len(stems) > 1:
        return re.sub(r"\d.*", "*", values[0])
    (stem,) = stems
    numbers = sorted(int(match[2]) for match in matches)
    if stem and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{stem}{numbers[0]}..{numbers[-1]}"
    return f"{stem}*"
