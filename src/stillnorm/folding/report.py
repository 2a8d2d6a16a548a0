"""What fold did, per path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from stillnorm.folding.error import FoldError
from stillnorm.reports import Block, Document, Line, Table, json, text
from stillnorm.reports.numbers import count, short
from stillnorm.reports.refusals import refusal_rows


@dataclass(frozen=True, eq=False)
class FoldReport:
    """What `fold` did.

    Args:
        model: The new model, in eval mode, of plain torch layers where it had plain torch layers.
        folded: Paths of the norm layers that are gone.
        refused: (path, reason) of those that stay.
        max_error: The largest difference between the outputs of the two models on the example,
            relative to the largest value.
        errors: By path of a folded norm, its rounding errors on its own input.
        judged_whole: Whether the whole model was compared in float64, too; not where it does not
            run in float64.
    """

    model: nn.Module
    folded: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    max_error: float
    errors: Mapping[str, FoldError]
    judged_whole: bool

    def document(self) -> Document:
        """Return the report as a document."""
        blocks: list[Block] = [
            Line(f"output off by {short(self.max_error)} of its largest value on the example")
        ]
        if not self.judged_whole:
            blocks.append(Line("not compared in float64: the model does not run in it"))
        if self.refused:
            rows = refusal_rows(self.refused)
            blocks += [Line(""), Table(("not folded", "because"), rows, "ll")]
        head = f"{count(len(self.folded), 'norm')} folded, {len(self.refused)} not"
        return Document(head, tuple(blocks))

    def to_json(self) -> str:
        """Return it as JSON, without the model."""
        return json.dumps(
            {
                "folded": self.folded,
                "refused": self.refused,
                "max_error": self.max_error,
                "errors": dict(self.errors),
                "judged_whole": self.judged_whole,
            }
        )

    def __str__(self) -> str:
        return text.write(self.document())
