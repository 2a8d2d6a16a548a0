"""What an operation on a model's layers did, and the way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field

from stillnorm.calibration import RecalibrationReport
from stillnorm.repair.surgery import Surgery
from stillnorm.reports import Block, Document, Line, Table, text
from stillnorm.reports.json import dumps
from stillnorm.reports.numbers import count
from stillnorm.reports.refusals import refusal_rows


class Written(ABC):
    """A report: what it says as a document, written as text or with its data as JSON."""

    @abstractmethod
    def document(self) -> Document:
        """Return the report as a document."""

    def to_json(self) -> str:
        """Return the report as JSON."""
        return dumps(self)

    def __str__(self) -> str:
        return text.write(self.document())


@dataclass(frozen=True)
class Split:
    """One layer that was split.

    Args:
        path: Its path.
        paths: All its paths.
        calls: How often it was called in one forward.
        norms: The number of norms that do its work now.
    """

    path: str
    paths: tuple[str, ...]
    calls: int
    norms: int


@dataclass(frozen=True, eq=False)
class SplitReport(Written):
    """What `split_shared` did.

    Args:
        split: The layers that were split.
        refused: (path, reason) of layers that are called several times and were left alone.
        recalibration: The statistics of the new norms; None where nothing was split.
    """

    split: tuple[Split, ...]
    refused: tuple[tuple[str, str], ...]
    recalibration: RecalibrationReport | None
    _surgery: Surgery = field(repr=False)

    def undo(self) -> None:
        """Put the shared layers back, the same objects with the statistics that they had."""
        self._surgery.undo()

    def document(self) -> Document:
        """Return the report as a document."""
        blocks: list[Block] = []
        if self.split:
            rows = tuple(
                (", ".join(one.paths), str(one.calls), str(one.norms)) for one in self.split
            )
            blocks += [Line(""), Table(("split", "calls", "norms now"), rows, "lrr")]
        blocks += left_alone(self.refused)
        return Document(f"{count(len(self.split), 'shared layer')} split", tuple(blocks))


@dataclass(frozen=True)
class Replaced:
    """One layer that was replaced.

    Args:
        path: Its path.
        paths: All its paths.
        before: The class that stood there.
        after: The class that stands there now.
        lost: What the old layer had and the new one has not; empty for nothing.
    """

    path: str
    paths: tuple[str, ...]
    before: str
    after: str
    lost: str


@dataclass(frozen=True, eq=False)
class ReplaceReport(Written):
    """What `replace` did.

    Args:
        replaced: The layers that were replaced.
        already: Paths of the layers that were of that kind before.
        refused: (path, reason) of the layers that were left alone.
    """

    replaced: tuple[Replaced, ...]
    already: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    _surgery: Surgery = field(repr=False)

    def undo(self) -> None:
        """Put the old layers back: the same objects, in the mode that they had.

        Parameters and buffers that the new layers took over keep their present values.
        """
        self._surgery.undo()

    def document(self) -> Document:
        """Return the report as a document, one row for all layers that fared alike."""
        alike: dict[tuple[str, str, str], list[str]] = {}
        for one in self.replaced:
            row = (one.before, one.after, one.lost or "nothing")
            alike.setdefault(row, []).append(", ".join(one.paths))
        rows = tuple(
            (refusal_rows((path, "") for path in paths)[0][0], *row) for row, paths in alike.items()
        )
        head = f"{count(len(self.replaced), 'layer')} replaced"
        if self.already:
            head += f", {len(self.already)} of that kind already"
        table = Table(("replaced", "was", "is", "lost"), rows, "llll")
        blocks = (Line(""), table) if rows else ()
        return Document(head, (*blocks, *left_alone(self.refused)))


def left_alone(refused: Iterable[tuple[str, str]]) -> tuple[Block, ...]:
    """Return the refusals as a table; nothing where there are none."""
    rows = refusal_rows(refused)
    return (Line(""), Table(("refused", "because"), rows, "ll")) if rows else ()
