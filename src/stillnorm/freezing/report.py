"""What freeze and unfreeze did, per path."""

from __future__ import annotations

from dataclasses import dataclass

from stillnorm.reports import Block, Document, Line, Table, json, text
from stillnorm.reports.numbers import count, size
from stillnorm.reports.refusals import refusal_rows

Refusals = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class FreezeReport:
    """What `freeze` did.

    Args:
        frozen: Paths of the layers that are held now as asked.
        already_frozen: Paths of the layers that were so before.
        refused: (path, reason) of the layers that were left alone.
        folded: Paths of the held layers that are computed in the convolution before them.
        not_folded: (path, reason) of the held layers that are not, where `fold_on` was given.
        bytes_before: What autograd keeps for backward in one forward on the example with the
            layers in eval mode; None without an example.
        bytes_after: What it keeps now.
    """

    frozen: tuple[str, ...]
    already_frozen: tuple[str, ...]
    refused: Refusals
    folded: tuple[str, ...] = ()
    not_folded: Refusals = ()
    bytes_before: int | None = None
    bytes_after: int | None = None

    def document(self) -> Document:
        """Return the report as a document."""
        head = f"{count(len(self.frozen), 'layer')} frozen"
        if self.already_frozen:
            head += f", {len(self.already_frozen)} already frozen"
        if self.bytes_before is None or self.bytes_after is None:
            return _document(head, self.refused)
        head += f", {len(self.folded)} folded into the convolution before"
        blocks: list[Block] = [
            Line(
                f"saved for backward on the example: {size(self.bytes_before)} before, "
                f"{size(self.bytes_after)} now"
            )
        ]
        for label, refusals in (("refused", self.refused), ("held, not folded", self.not_folded)):
            if refusals:
                blocks += [Line(""), Table((label, "because"), refusal_rows(refusals), "ll")]
        if self.refused:
            head += f", {len(self.refused)} refused"
        return Document(head, tuple(blocks))

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(self)

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
