"""What every chapter of the demo is: measured numbers, and two ways to tell them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Protocol, TypeVar

from stillnorm.diagnosis import Finding, Report
from stillnorm.errors import StillnormError
from stillnorm.reports import Block, Document, Line
from stillnorm.reports.numbers import percent

T = TypeVar("T")

ENOUGH = 0.05  # of the score: what eval mode must lose before it is worth a demo


class Track(Protocol):
    """Passes items on and shows how far they are; see `progress`."""

    def __call__(self, items: Sequence[T], what: str) -> Iterable[T]:
        """Yield the items of the work called `what`."""
        ...


class Chapter(ABC):
    """The measured result of one chapter; subclasses are frozen dataclasses of numbers."""

    thread: ClassVar[str]
    title: ClassVar[str]

    @abstractmethod
    def brief(self) -> tuple[Block, ...]:
        """Tell it in a few lines, for the terminal."""

    @abstractmethod
    def page(self) -> tuple[Block, ...]:
        """Tell it with code, plots and findings, for the page."""

    @abstractmethod
    def numbers(self) -> Mapping[str, float]:
        """Return the measured numbers by name, scores as fractions."""

    def document(self, number: int) -> Document:
        """Return the brief chapter under its title."""
        return Document(f"{number}  {self.title}", self.brief())


def demand_drama(thread: str, what: str, right: float, wrong: float) -> None:
    """Raise when the fault that a chapter is about did not happen.

    Args:
        thread: The thread's number.
        what: What the two scores are.
        right: The score as trained.
        wrong: The score that the thread complains of.

    Raises:
        StillnormError: They are within five points of each other.
    """
    if not right - wrong >= ENOUGH:
        raise StillnormError(
            f"thread {thread} did not happen: {what} {percent(right)} against {percent(wrong)}",
            help="the demo shows nothing this way: run it with another --seed, and report it",
        )


def checked(findings: Iterable[Finding]) -> Line:
    """Say in one line what `check` found: codes with their layers."""
    return Line("check: " + ("; ".join(map(_named, findings)) or "nothing found"), indent=2)


def _named(finding: Finding) -> str:
    paths = [path or "(root)" for path in finding.paths]
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{finding.code} {finding.slug}: {', '.join(paths[:3])}{more}"


def as_checked(report: Report) -> tuple[Block, ...]:
    """Return what `print(report)` shows, without the blank lines that only set it in a terminal."""
    return (Line(report.document().title), *report.document().blocks)
