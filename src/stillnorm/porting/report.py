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
        variance: That of the running variances, relative to the largest, or to a thousandth of the
            largest squared mean; of Keras' update first times n / (n - 1), for torch keeps the
            unbiased one.
        rounding: What rounding explains of both.
        tolerance: What is allowed of both.
    """

    path: str
    name: str
    values: int | None
    mean: float
    variance: float
    rounding: float
    tolerance: float

    @property
    def largest(self) -> float:
        """The larger of both."""
        return max(self.mean, self.variance)


@dataclass(frozen=True)
class Agreement(Written):
    """How well two models agree on an example.

    Args:
        error: The largest difference of their outputs in eval mode; of several outputs, that of
            the one which is worst off.
        largest: The largest finite value in it.
        tolerance: How much they may differ, relative to the largest.
        rounding: How far the torch model is off itself in another precision, by which the tolerance
            was set, relative to the largest; None where it was given, or could not be measured.
        settings: (path, what differs) of norms with another eps or momentum, or frozen on one side,
            and of dropouts with another rate.
        statistics: Per norm, in the order of the torch model's forward, what one forward in train
            mode made of the statistics.
        not_compared: Why that was not done; empty where it was.
        unequal: Where outputs differ, the paths of layers whose weights do.
        given: Whether the tolerance was given.
        output: Which of several outputs the numbers are of, from 0; None where there is one.
    """

    error: float
    largest: float
    tolerance: float
    rounding: float | None
    settings: tuple[tuple[str, str], ...]
    statistics: tuple[StatisticsError, ...]
    not_compared: str = ""
    unequal: tuple[str, ...] = ()
    given: bool = False
    output: int | None = None

    @property
    def same_outputs(self) -> bool:
        """Whether the outputs are the same within the tolerance."""
        return self.error <= self.tolerance * self.largest

    @property
    def same_statistics(self) -> bool:
        """Whether the statistics are, as far as they were compared."""
        return all(one.largest <= one.tolerance for one in self.statistics)

    def __bool__(self) -> bool:
        return self.same_outputs and self.same_statistics and not self.settings

    @property
    def place(self) -> str:
        """Where the difference begins, as far as the statistics tell; empty where they do not."""
        learning = [one for one in self.statistics if one.values is not None]
        if (self.same_outputs and self.same_statistics) or not learning:
            return ""
        agree: StatisticsError | None = None
        for one in learning:
            if one.largest > one.rounding:
                after = f", after {agree.path or '(root)'}, which agrees" if agree else ""
                return (
                    f"the first norm that differs in the forward is {one.path or '(root)'}{after}"
                )
            agree = one
        if agree is None or self.unequal or not self.same_statistics:
            return ""
        return f"all norms agree: the difference lies after the last, {agree.path or '(root)'}"

    def told(self) -> str:
        """Return the numbers as one line."""
        return "; ".join(self.lines())

    def lines(self) -> tuple[str, ...]:
        """Return the numbers, a line for each comparison: first what differs."""
        differ: list[str] = []
        agree: list[str] = []
        (agree if self.same_outputs else differ).append(self._outputs())
        if self.unequal:
            first, *others = (path or "(root)" for path in self.unequal)
            more = f" and {count(len(others), 'other')}" if others else ""
            differ.append(f"weights differ: {first}{more}")
        differ += (f"{paths}: {what}" for paths, what in refusal_rows(self.settings))
        if self.not_compared:
            agree.append(f"statistics after a training step not compared: {self.not_compared}")
        elif self.statistics:
            (agree if self.same_statistics else differ).append(self._step())
        if self.place:
            differ.append(self.place)
        return *differ, *agree

    def _outputs(self) -> str:
        share = self.error / self.largest if self.largest else self.error
        why = ", as given"
        if self.rounding is not None:
            why = f", for the torch model itself rounds by {_percent(self.rounding)}"
        elif not self.given:
            why = ", for a copy of the torch model does not run in float64"
        verdict = "agree" if self.same_outputs else "differ"
        worst = "" if self.output is None else f"output {self.output} is the worst, "
        return (
            f"eval outputs {verdict}: {worst}off by {short(self.error)} where "
            f"the largest is {short(self.largest)}, {_percent(share)}; allowed are "
            f"{_percent(self.tolerance)}{why}"
        )

    def _step(self) -> str:
        worst = max(self.statistics, key=lambda one: one.largest / (one.tolerance or 1.0))
        verdict = "agree" if self.same_statistics else "differ"
        return (
            f"statistics after a training step {verdict}: off by "
            f"{_percent(worst.largest)} of the layer's largest in {worst.path or '(root)'}, the "
            f"worst of {count(len(self.statistics), 'norm')}; allowed are "
            f"{_percent(worst.tolerance)}, the variance in Keras times n / (n - 1)"
        )

    def document(self) -> Document:
        """Return it as a document."""
        title = "the models agree" if self else "the models differ"
        return Document(title, (Line(""), *map(Line, self.lines())))


@dataclass(frozen=True)
class Setting:
    """What a port has set on a norm.

    Args:
        name: "eps", "momentum", "held", "weight.requires_grad" or "bias.requires_grad".
        before: What it was in the torch model.
        after: What it is.
    """

    name: str
    before: float | bool | None
    after: float | bool | None

    def __str__(self) -> str:
        return f"{self.name} {_written(self.before)} -> {_written(self.after)}"


@dataclass(frozen=True)
class Ported:
    """One layer that was ported.

    Args:
        name: Its name in the Keras model.
        path: Its path in the torch model.
        kind: What it is: "batch norm", "convolution", "transposed convolution", "dense layer".
        notes: What is worth knowing about it.
        layer: The class of the torch layer, of a held one that which it was.
        settings: What was set on a torch norm besides tensors, and is in no file of them.
    """

    name: str
    path: str
    kind: str
    notes: tuple[str, ...] = ()
    layer: str = ""
    settings: tuple[Setting, ...] = ()


@dataclass(frozen=True, eq=False)
class PortReport(Written):
    """What a port did.

    Args:
        to: The framework of the model that was changed.
        ported: The layers that were ported.
        refused: (name or path, reason) of layers with weights that were not.
        matched: How layers were matched: by the "map" given, by equal "names", by "order".
        left_in_keras: Names that the map does not mention.
        left_in_torch: Paths that it does not mention.
        by_chance: Whether, matched by order, layers of one shape may have changed places.
        variance: What was done about the biased and the unbiased variance.
        agreement: How well the models agree on the example, before the variance was corrected;
            None without an example.
        recompile: Whether a compiled Keras model has to be compiled again for the changes to count.
    """

    to: Literal["torch", "keras"]
    ported: tuple[Ported, ...]
    refused: tuple[tuple[str, str], ...]
    matched: Literal["map", "names", "order"]
    left_in_keras: tuple[str, ...]
    left_in_torch: tuple[str, ...]
    by_chance: bool
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
            places = "; layers of one shape may have changed places" * self.by_chance
            lines.append(f"outputs not compared: example= does that{places}")
        if self.recompile:
            lines.append("the Keras model is compiled: compile() again, then train")
        for side, left in (("Keras", self.left_in_keras), ("torch", self.left_in_torch)):
            if left:
                lines.append(f"in {side}, not in names=, left alone: {', '.join(left)}")
        lines += self.unwritten()
        blocks: list[Block] = [Line(""), *map(Line, lines)]
        noted = ((one.path, note) for one in self.ported for note in one.notes)
        if rows := refusal_rows(noted):
            blocks += [Line(""), Table(("layer", "note"), rows, "ll")]
        blocks += left_alone(self.refused)
        if self.by_chance:
            blocks += [Line(""), Table(("Keras", "torch", "kind"), self._pairs(), "lll")]
        return Document(title, tuple(blocks))

    def unwritten(self) -> list[str]:
        """Return what was set that no file of tensors has, and what to write for it: two lines."""
        norms = [(one, setting) for one in self.ported for setting in one.settings]
        if not norms:
            return []
        changed = refusal_rows(
            (one.path, ", ".join(map(str, one.settings))) for one in self.ported if one.settings
        )
        code = refusal_rows((one.path, line) for one in self.ported for line in _code(one))
        many = count(len({one.path for one, _ in norms}), "norm")
        return [
            f"set on {many}, and in no file of tensors: {_listed(changed[:_KINDS], changed)}",
            f"write it where the torch model is made: {_listed(code, code)}",
        ]

    def _pairs(self) -> tuple[tuple[str, str, str], ...]:
        """Return which layer went where, of many the first few."""
        rows = [(one.name, one.path or "(root)", one.kind) for one in self.ported]
        if len(rows) > _SHOWN:
            rows = [*rows[:_SHOWN], (f"and {len(rows) - _SHOWN} more: report.ported", "", "")]
        return tuple(rows)


_SHOWN, _KINDS = 20, 3
_Rows = tuple[tuple[str, str], ...]


def _listed(rows: _Rows, of: _Rows) -> str:
    """Write what is so of which norms; of one thing without the norms."""
    shown = [what if len(of) == 1 else f"{what} ({paths})" for paths, what in rows]
    more = len(of) - len(rows)
    return "; ".join([*shown, *([f"and {more} more, in report.ported"] if more > 0 else [])])


def _code(ported: Ported) -> list[str]:
    """Return what a person writes for the settings of a norm."""
    after = {one.name: one.after for one in ported.settings}
    arguments = [f"{k}={after[k]!r}" for k in ("eps", "momentum") if k in after]
    lines = [f"{ported.layer}(..., {', '.join(arguments)})"] if arguments else []
    if "held" in after:
        lines.append("sn.freeze(model, layers)" if after["held"] else "sn.unfreeze(model, layers)")
    for name in ("weight", "bias"):
        if (learns := after.get(f"{name}.requires_grad")) is not None:
            lines.append(f"{name}.requires_grad_({learns})")
    return lines


def _written(value: float | bool | None) -> str:
    return f"{value:.6g}" if type(value) is float else str(value)


def _percent(share: float) -> str:
    return f"{short(100 * share)} %"
