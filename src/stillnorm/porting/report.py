"""What a port did, and how well the two models agree."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stillnorm.repair.report import Written, left_alone
from stillnorm.repair.surgery import Surgery
from stillnorm.reports import Block, Document, Line, Table
from stillnorm.reports.numbers import count, short
from stillnorm.reports.refusals import refusal_rows


@dataclass(frozen=True)
class StatisticsError:
    """How far a layer's statistics are from its twin's after one forward in train mode.

    Args:
        path: The path of the torch layer.
        name: The name of the Keras layer.
        values: n, the number of values in each channel, the least where the layer is called several
            times; None where nothing is updated.
        mean: The largest difference of the running means, relative to the larger of the largest
            mean and the largest deviation.
        variance: That of the running variances, relative to the largest; of Keras' update first
            times n / (n - 1), for torch keeps the unbiased one.
    """

    path: str
    name: str
    values: int | None
    mean: float
    variance: float

    @property
    def largest(self) -> float:
        """The larger of both."""
        return max(self.mean, self.variance)


@dataclass(frozen=True)
class Agreement(Written):
    """How well two models agree on an example.

    Args:
        error: The largest difference of their outputs in eval mode.
        largest: The largest output.
        tolerance: How much they may differ, relative to the largest.
        settings: (path, what differs) of norms with another eps or momentum, or frozen on one side.
        statistics: Per norm, what one forward in train mode made of the statistics.
        not_compared: Why that was not done; empty where it was.
    """

    error: float
    largest: float
    tolerance: float
    settings: tuple[tuple[str, str], ...]
    statistics: tuple[StatisticsError, ...]
    not_compared: str = ""

    @property
    def same_outputs(self) -> bool:
        """Whether the outputs are the same within the tolerance."""
        return self.error <= self.tolerance * self.largest

    @property
    def same_statistics(self) -> bool:
        """Whether the statistics are, as far as they were compared."""
        return all(one.largest <= self.tolerance for one in self.statistics)

    def __bool__(self) -> bool:
        return self.same_outputs and self.same_statistics and not self.settings

    def told(self) -> str:
        """Return the numbers as one line."""
        return "; ".join(self.lines())

    def lines(self) -> tuple[str, ...]:
        """Return the numbers, a line for either comparison."""
        outputs = (
            f"eval outputs differ by {short(self.error)}, the largest is {short(self.largest)}, "
            f"tolerance {short(self.tolerance)} of it"
        )
        settings = tuple(f"{paths}: {what}" for paths, what in refusal_rows(self.settings))
        after = "statistics after a training step"
        if self.not_compared:
            return outputs, *settings, f"{after} not compared: {self.not_compared}"
        if not self.statistics:
            return outputs, *settings
        worst = max(self.statistics, key=lambda one: one.largest)
        differ = f"differ by {short(worst.largest)} in {worst.path or '(root)'}, the worst of"
        step = "the variance of a step in Keras times n / (n - 1)"
        norms = count(len(self.statistics), "norm")
        return outputs, *settings, f"{after} {differ} {norms}; {step}"

    def document(self) -> Document:
        """Return it as a document."""
        title = "the models agree" if self else "the models differ"
        return Document(title, (Line(""), *map(Line, self.lines())))


@dataclass(frozen=True)
class Ported:
    """One layer that was ported.

    Args:
        name: Its name in the Keras model.
        path: Its path in the torch model.
        kind: What it is: "batch norm", "convolution", "transposed convolution", "dense layer".
        notes: What is worth knowing about it.
    """

    name: str
    path: str
    kind: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class PortReport(Written):
    """What a port did.

    Args:
        to: The framework of the model that was changed.
        ported: The layers that were ported.
        refused: (name or path, reason) of layers with weights that were not.
        matched: How layers were matched: by the "map" given, by equal "names", by "order".
        left: Names and paths that the map does not mention.
        variance: What was done about the biased and the unbiased variance.
        agreement: How well the models agree on the example, before the variance was corrected;
            None without an example.
        recompile: Whether a compiled Keras model has to be compiled again for the changes to count.
    """

    to: Literal["torch", "keras"]
    ported: tuple[Ported, ...]
    refused: tuple[tuple[str, str], ...]
    matched: Literal["map", "names", "order"]
    left: tuple[str, ...]
    variance: str
    agreement: Agreement | None
    recompile: bool
    _surgery: Surgery = field(repr=False)

    def undo(self) -> None:
        """Put everything back, bit for bit."""
        self._surgery.undo()

    def document(self) -> Document:
        """Return the report as a document."""
        norms = sum(one.kind == "batch norm" for one in self.ported)
        by = {"map": "names=", "names": "name", "order": "order"}[self.matched]
        title = (
            f"{count(len(self.ported), 'layer')} ported to {self.to}, {norms} of them batch norms, "
            f"matched by {by}"
        )
        lines = [self.variance] if norms else []
        if self.agreement is not None:
            lines += self.agreement.lines()
        else:
            places = "; layers of one shape may have changed places" * (self.matched == "order")
            lines.append(f"outputs not compared: example= does that{places}")
        if self.recompile:
            lines.append("the Keras model is compiled: compile() again, then train")
        if self.left:
            lines.append(f"not in names=, left alone: {', '.join(self.left)}")
        blocks: list[Block] = [Line(""), *map(Line, lines)]
        noted = ((one.path, note) for one in self.ported for note in one.notes)
        if rows := refusal_rows(noted):
            blocks += [Line(""), Table(("layer", "note"), rows, "ll")]
        blocks += left_alone(self.refused)
        return Document(title, tuple(blocks))
