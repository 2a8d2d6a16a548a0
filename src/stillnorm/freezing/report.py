"""What freeze and unfreeze did, per path."""

from __future__ import annotations

from dataclasses import dataclass

from stillnorm.reports import Document, Line, Table, text
from stillnorm.reports.numbers import count

Refusals = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FreezeReport:
    """What `freeze` did.

    Args:
        frozen: Paths of the layers that are held now as asked.
        already_frozen: Paths of the layers that were so before.
        refused: (path, reason) of the layers that were left alone.
    """

    frozen: tuple[str, ...]
    already_frozen: tuple[str, ...]
    refused: Refusals

    def document(self) -> Document:
        """Return the report as a document."""
        head = f"{count(len(self.frozen), 'layer')} frozen"
        if self.already_frozen:
            head += f", {len(self.already_frozen)} already frozen"
        return _document(head, self.refused)

    def __str__(self) -> str:
        return text.write(self.document())


@dataclass(frozen=True)
class UnfreezeReport:
    """What `unfreeze` did.

    Args:
        unfrozen: Paths of the layers that were released.
        not_held: Paths of the layers that stillnorm did not hold.
        refused: (path, reason) of the layers that were left alone.
    """

    unfrozen: tuple[str, ...]
    not_held: tuple[str, ...]
    refused: Refusals

    def document(self) -> Document:
        """Return the report as a document."""
        head = f"{count(len(self.unfrozen), 'layer')} unfrozen"
        if self.not_held:
            head += f", {len(self.not_held)} not held by stillnorm"
        return _document(head, self.refused)

    def __str__(self) -> str:
        return text.write(self.document())


def _document(head: str, refused: Refusals) -> Document:
    if not refused:
        return Document(head, ())
    rows = tuple((path or "(root)", reason) for path, reason in refused)
    return Document(
        f"{head}, {len(refused)} refused",
        (Line(""), Table(("refused", "because"), rows, "ll")),
    )
