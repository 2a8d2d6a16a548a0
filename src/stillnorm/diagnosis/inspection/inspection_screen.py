"""What `inspect` prints: a row per layer or per group of identical siblings, and how to read it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING

from stillnorm.diagnosis.inspection.siblings import collapse
from stillnorm.reports import Block, Document, Line, Span, Table, Text
from stillnorm.reports.document import plain
from stillnorm.reports.numbers import count, span

if TYPE_CHECKING:
    from stillnorm.diagnosis.finding import Finding
    from stillnorm.diagnosis.inspection import Inspected, Inspection

_NO_NORMS = (
    "no batch norm, no instance norm, no frozen norm layer. LayerNorm and GroupNorm normalise by "
    "the sample in every mode and keep no statistics: there is nothing in them to see or to hold."
)


_NONE = (
    "no running statistics: nothing of batch norm is in it, or it was left out when it was saved."
)


def document(inspection: Inspection, *, all: bool) -> Document:
    """Lay an inspection out: headline, table, legend, suspicious rows."""
    layers = inspection.layers
    if not layers and inspection.file:
        return Document(f"{inspection.model}: {inspection.file}, no norm layers", (Line(_NONE),))
    if not layers:
        return Document(f"{inspection.model}: no norm layers", (Line(_NO_NORMS),))
    marks = _marks(inspection.findings)
    groups = collapse(
        layers,
        path=lambda layer: layer.path,
        alike=lambda layer: layer.paths if all else _alike(layer, marks),
    )
    rows = [_Row(pattern, members, marks) for pattern, members in groups]
    blocks = (
        *_said_once(rows),
        _table(rows),
        Line(""),
        *(_legend_of_file(inspection) if inspection.file else _legend(layers)),
        *_pointers(inspection),
    )
    return Document(_headline(inspection, len(rows)), blocks)


def _headline(inspection: Inspection, rows: int) -> str:
    layers = inspection.layers
    facts = [
        count(len(layers), "norm layer")
        + (f" in {count(rows, 'row')}" if rows < len(layers) else "")
    ]
    if inspection.file:
        return f"{inspection.model}: {', '.join([inspection.file, *facts])}"
    if held := sum(layer.held is not None for layer in layers):
        facts.append(f"{held} held")
    ours = [layer for layer in layers if layer.provider != "keras"]
    if layers and not ours:  # Keras' alone
        return f"{inspection.model}: {', '.join(facts)}"
    facts.append(f"{'train' if inspection.training else 'eval'} mode now")
    others = sum(layer.held is None and layer.training != inspection.training for layer in ours)
    if others:
        facts.append(f"{others} of the norms in {'eval' if inspection.training else 'train'}")
    return f"{inspection.model}: {', '.join(facts)}"


def _marks(findings: tuple[Finding, ...]) -> dict[str, tuple[str, ...]]:
    """Map the paths that findings are about to the findings' codes."""
    marks: dict[str, tuple[str, ...]] = {}
    for finding in findings:
        for path in finding.paths:
            marks[path] = (*marks.get(path, ()), finding.code)
    return marks


def _alike(layer: Inspected, marks: dict[str, tuple[str, ...]]) -> Hashable:
    """Return all that the layers of one row have in common."""
    return (
        layer.paths if len(layer.paths) > 1 else (),
        layer.kind,
        layer.training,
        layer.normalizes_by_in_train,
        layer.normalizes_by_in_eval,
        layer.updates_statistics,
        layer.has_affine,
        layer.trains_affine,
        layer.held,
        layer.eps,
        layer.momentum,
        layer.variance is None,
        layer.dtype,
        layer.used,
        marks.get(layer.path),
    )


# ------------------------------------------------------------------------------- the table


class _Row:
    """One row of the table: siblings that differ in channels, batches seen and variance only."""

    def __init__(
        self, pattern: str, members: tuple[Inspected, ...], marks: dict[str, tuple[str, ...]]
    ) -> None:
        self.first = members[0]
        self.members = members
        self.path = " = ".join(self.first.paths) if len(self.first.paths) > 1 else pattern
        self.mark = "!" if self.first.path in marks else ""

    def many(self) -> str:
        return f"{len(self.members)} x" if len(self.members) > 1 else ""

    def channels(self) -> str:
        values = sorted({layer.num_features for layer in self.members})
        if values == [0]:
            return "-" if self.first.training is None else "lazy"
        return str(values[0]) if len(values) == 1 else f"{values[0]}..{values[-1]}"

    def updates(self) -> str:
        """Write the momentum; ``-`` for what cannot move, 0 for what only stands still."""
        layer = self.first
        if layer.training is None:
            return "-"
        stands_still = layer.momentum == 0 and layer.normalizes_by_in_train != "running"
        if not layer.updates_statistics and not (stands_still and layer.variance is not None):
            return "-"
        return "1/n" if layer.momentum is None else f"{layer.momentum:g}"

    def affine(self) -> str:
        if not self.first.has_affine:
            return "none"
        if self.first.training is None:
            return "yes"
        return "learns" if self.first.trains_affine else "frozen"

    def held(self) -> str:
        """Name who holds the layer; the kind of a foreign layer has its own column."""
        if self.first.training is None:
            return "-"
        return (self.first.held or "no").removesuffix(f" {self.first.kind}")

    def seen(self) -> str:
        values = [layer.batches_seen for layer in self.members if layer.batches_seen is not None]
        if not values:
            return "-"
        low, high = min(values), max(values)
        return str(low) if low == high else f"{low}..{high}"

    def variance(self) -> Text:
        ranges = [layer.variance for layer in self.members if layer.variance is not None]
        if not ranges:
            return "none"
        ends = [end for both in ranges for end in both]
        low = min(ends) if all(map(math.isfinite, ends)) else math.nan
        shown = span(low, max(ends)) if math.isfinite(low) else "not finite"
        return Span(shown, "" if low >= 0 else "error")

    def used(self) -> Text:
        """Write what the forward used; marked where the layer's flag says otherwise."""
        layer = self.first
        if not layer.used:
            return "never called"
        kinds = Counter(layer.used)
        shown = ", ".join(kind if n == 1 else f"{kind} x{n}" for kind, n in kinds.items())
        if layer.training is None:
            return Span(shown, "error" if "batch" in kinds else "")
        said = layer.normalizes_by_in_train if layer.training else layer.normalizes_by_in_eval
        return Span(shown, "" if set(kinds) == {said} else "error")


_Column = tuple[str, str, Callable[[_Row], Text]]  # header, alignment, cell

# What these say of every layer alike is said once, above the table.
_ONCE: tuple[_Column, ...] = (
    ("kind", "l", lambda row: row.first.kind or "-"),
    ("updates", "l", _Row.updates),
    ("affine", "l", _Row.affine),
    ("held", "l", _Row.held),
    ("seen", "r", _Row.seen),
    ("eps", "l", lambda row: "-" if row.first.eps is None else f"{row.first.eps:g}"),
    ("dtype", "l", lambda row: row.first.dtype or "-"),
)


def _differs(column: _Column, rows: list[_Row]) -> bool:
    """Tell whether a column is worth its width; a single row has room for all but eps and dtype."""
    header, _, cell = column
    if len(rows) == 1:
        return header not in ("eps", "dtype")
    return len({plain(cell(row)) for row in rows}) > 1


def _said_once(rows: list[_Row]) -> Iterator[Line]:
    facts = [
        plain(cell(rows[0])) if header in ("kind", "dtype") else f"{header} {plain(cell(rows[0]))}"
        for header, align, cell in _ONCE
        if not _differs((header, align, cell), rows)
        and not (rows[0].first.training is None and plain(cell(rows[0])) == "-")
    ]
    if facts:
        yield Line(f"everywhere: {', '.join(facts)}")
        yield Line("")


def _table(rows: list[_Row]) -> Table:
    columns = [column for column in _columns(rows) if column not in _ONCE or _differs(column, rows)]
    return Table(
        header=tuple(header for header, _, _ in columns),
        rows=tuple(tuple(cell(row) for _, _, cell in columns) for row in rows),
        align="".join(align for _, align, _ in columns),
    )


def _columns(rows: list[_Row]) -> Iterator[_Column]:
    """Yield the columns from left to right."""
    kind, *rest = _ONCE
    yield "path", "l", lambda row: row.path or "(root)"
    if any(len(row.members) > 1 for row in rows):
        yield "", "r", _Row.many
    yield kind
    yield "C", "r", _Row.channels
    yield "train()", "l", lambda row: row.first.normalizes_by_in_train or "-"
    yield "eval()", "l", lambda row: row.first.normalizes_by_in_eval or "-"
    if rows[0].first.used is not None:
        yield "used", "l", _Row.used
    yield from rest
    yield "variance", "l", _Row.variance
    if any(row.mark for row in rows):
        yield "", "l", lambda row: Span(row.mark, "error")


# ------------------------------------------------------------------------------- below it


_VARIANCE = Line(
    "variance: running_var, not a deviation.  "
    "seen: num_batches_tracked, 0 can be a legacy checkpoint."
)


def _legend(layers: tuple[Inspected, ...]) -> Iterator[Line]:
    """Say how to read the table."""
    yield Line(
        "train()/eval(): what normalises in that mode.  "
        "updates: torch momentum, the weight of a new batch."
    )
    if any(layer.provider == "keras" for layer in layers):
        yield Line("of a layer of Keras: train() is a call with training=True, eval() one without.")
    if layers[0].used is not None:
        yield Line("used: what the forward really used on this batch, in the modes of now.")
    yield _VARIANCE


def _legend_of_file(inspection: Inspection) -> Iterator[Line]:
    """Say how to read the table of a file."""
    yield Line("-: the file does not say: modes, settings and what learns are the model's.")
    if inspection.layers[0].used is not None:
        yield Line("used: what the graph normalises by, whatever the mode.")
    yield _VARIANCE


def _pointers(inspection: Inspection) -> Iterator[Block]:
    """Point from the marked rows to the rules that explain them."""
    if not inspection.findings:
        return
    yield Line("")
    rows = (
        (Span("!", "error"), _who(finding, inspection), f"{finding.message} ({finding.code})")
        for finding in inspection.findings
    )
    yield Table((), tuple(rows), "lll")
    yield Line("run: stillnorm check to measure it, stillnorm explain CODE to read about it")


def _who(finding: Finding, inspection: Inspection) -> str:
    first, others = finding.paths[0] or "(root)", len(finding.paths) - 1
    if others == 0:
        return first
    if len(finding.paths) == len(inspection.layers):
        return "all of them"
    return f"{first} and {others} more"
