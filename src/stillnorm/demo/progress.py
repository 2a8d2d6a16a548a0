"""Progress bars on stderr, gone when the work is done."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from stillnorm.demo.chapter import Track

T = TypeVar("T")


def silent(items: Sequence[T], what: str) -> Iterable[T]:
    """Show nothing."""
    return items


@contextmanager
def bars(title: str) -> Iterator[Track]:
    """Show a bar for each piece of work in the block, and clear them all at its end.

    Where stderr is no terminal, each piece of work is one line instead.
    """
    console = Console(stderr=True)
    if not console.is_terminal:

        def tell(items: Sequence[T], what: str) -> Iterable[T]:
            console.print(f"{title}: {what}", highlight=False)
            return items

        yield tell
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    # redirect_stdout: what chapters print belongs to stdout, not above the bars.
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:

        def show(items: Sequence[T], what: str) -> Iterable[T]:
            return progress.track(items, total=len(items), description=what)

        yield show
