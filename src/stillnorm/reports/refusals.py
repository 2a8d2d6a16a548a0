"""Refusals in a table: one row per reason, for most layers of a network share one."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 2


def refusal_rows(refusals: Iterable[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return (paths, reason) with the paths of each reason together.

    Example:
        >>> refusal_rows([("a", "lazy"), ("b", "shared"), ("c", "lazy")])
        (('a, c', 'lazy'), ('b', 'shared'))
    """
    by_reason: dict[str, list[str]] = {}
    for path, reason in refusals:
        by_reason.setdefault(reason, []).append(path or "(root)")
    return tuple(
        (
            ", ".join(paths[:_SHOWN])
            + (f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""),
            reason,
        )
        for reason, paths in by_reason.items()
    )
