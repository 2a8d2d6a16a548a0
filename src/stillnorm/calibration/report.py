"""What recalibrate did: per layer the statistics before and after, and the way back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from stillnorm.calibration.commit import write_all
from stillnorm.errors import StateError
from stillnorm.norms.adapters import adapter_of
from stillnorm.reports import (
    Bar,
    Bars,
    Block,
    Document,
    Heading,
    Histogram,
    Line,
    Series,
    Table,
    text,
)
from stillnorm.reports.json import dumps
from stillnorm.reports.numbers import count, number
from stillnorm.reports.refusals import refusal_rows

Method = Literal["pooled", "sequential"]

_SHOWN = 10
_PLOTTED = 6
_BINS = 24


@dataclass(frozen=True, eq=False)
class Recalibrated:
    """One layer with new running statistics.

    Args:
        path: Its path.
        paths: All its paths.
        samples: The number of samples that it received.
        count: The number of values in each channel behind its statistics; of an instance norm,
            of samples.
        mean_before: `running_mean` before, (C,).
        mean_after: `running_mean` now, (C,).
        var_before: `running_var` before, (C,).
        var_after: `running_var` now, (C,).
        eps: What the layer adds to the variance.
        mean_moved: How far the mean moved, in deviations of what the layer receives: root mean
            square over the channels.
        var_ratio: The new variance over the old, eps included: geometric mean over the channels.
        mean_error: The standard error of `mean_after`, (C,), float64; None where one batch alone
            reached the layer.
        var_error: The same of `var_after`.
        standard_error: The larger of both, of the mean in deviations and of the variance relative
            to it, each the root mean square over the channels.
    """

    path: str
    paths: tuple[str, ...]
    samples: int
    count: int
    mean_before: Tensor = field(repr=False)
    mean_after: Tensor = field(repr=False)
    var_before: Tensor = field(repr=False)
    var_after: Tensor = field(repr=False)
    eps: float
    mean_moved: float
    var_ratio: float
    mean_error: Tensor | None = field(repr=False)
    var_error: Tensor | None = field(repr=False)
    standard_error: float | None


def mean_moved(before: Tensor, after: Tensor, var: Tensor, eps: float) -> float:
    r"""Return sqrt(Σ_c (after - before)² / (var + eps) / C), in float64."""
    before, after, var = before.double(), after.double(), var.double()
    return math.sqrt(float(((after - before).square() / (var + eps)).mean()))


def var_ratio(before: Tensor, after: Tensor, eps: float) -> float:
    r"""Return exp(Σ_c log((after + eps) / (before + eps)) / C), in float64."""
    return float(((after.double() + eps) / (before.double() + eps)).log().mean().exp())


@dataclass(frozen=True, eq=False)
class RecalibrationReport:
    """What `recalibrate` did.

    Args:
        layers: The layers with new statistics, in registration order.
        unreached: Paths of layers that no batch reached; they keep their statistics.
        held: Paths of held layers, left alone because they were not named.
        shared: Paths of layers that were called more than once in a forward: one set of statistics
            for all that they receive.
        circular: Paths of layers whose input in eval mode depends on their own statistics, of the
            method "sequential": there is no fixed point, and they have the moments of what they
            received first.
        refused: (path, reason) of layers that cannot be recalibrated.
        method: "pooled" or "sequential".
        tolerance: The standard error at which it was to stop; None where it was to take all.
        batches: The number of batches.
        samples: The number of samples in them.
    """

    layers: tuple[Recalibrated, ...]
    unreached: tuple[str, ...]
    held: tuple[str, ...]
    shared: tuple[str, ...]
    circular: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    method: Method
    tolerance: float | None
    batches: int
    samples: int
    _before: Mapping[nn.Module, Mapping[str, Tensor]] = field(repr=False)

    @property
    def standard_error(self) -> float | None:
        """The largest standard error of any layer; None where one batch alone reached one."""
        errors = [layer.standard_error for layer in self.layers]
        known = [error for error in errors if error is not None]
        return max(known, default=0.0) if len(known) == len(errors) else None

    def undo(self) -> None:
        """Put the statistics back, bit for bit: all of them, or none.

        Raises:
            StateError: A layer has lost its statistics since, or has others of another shape.
        """
        changes = []
        for module, tensors in self._before.items():
            adapter = adapter_of(module)
            for name, value in tensors.items():
                tensor = None if adapter is None else adapter.tensor(module, name)
                if tensor is None or tensor.shape != value.shape:
                    raise StateError(
                        f"a {type(module).__name__} no longer has the {name} that was recalibrated",
                        help="undo before changing the model further",
                    )
                changes.append((tensor, value.to(tensor)))
        write_all(changes)

    def document(self) -> Document:
        """Return the report as a document: the layers that moved most, what was left alone."""
        title = (
            f"{count(len(self.layers), 'layer')} recalibrated on "
            f"{count(self.batches, 'batch')}, {count(self.samples, 'sample')} ({self.method})"
        )
        most = sorted(self.layers, key=_unsettled, reverse=True)[:_SHOWN]
        blocks: list[Block] = []
        if most:
            header = (
                "moved most", "values", "mean moved (new sigma)", "variance x", "standard error",
            )  # fmt: skip
            blocks += [Line(""), Table(header, tuple(map(_row, most)), "lrrrr")]
        if len(self.layers) > _SHOWN:
            blocks.append(Line(f"and {len(self.layers) - _SHOWN} more, which moved less"))
        if self.layers:
            blocks.append(Line(self._how_well()))
        for label, paths in (
            ("called several times, one set of statistics for all (see sn.check)", self.shared),
            ("given what comes of their own output, no fixed point", self.circular),
            ("not reached", self.unreached),
            ("held, left alone", self.held),
        ):
            if paths:
                blocks.append(Line(f"{label}: {', '.join(path or '(root)' for path in paths)}"))
        if self.refused:
            blocks += [Line(""), Table(("refused", "because"), refusal_rows(self.refused), "ll")]
        return Document(title, tuple(blocks))

    def _how_well(self) -> str:
        """Say how well the statistics are known, and what would be needed."""
        error = self.standard_error
        if error is None:
            return "one batch alone: how well the statistics are known cannot be told"
        told = f"largest standard error of any layer: {number(error)}"
        if self.tolerance is None or error <= self.tolerance:
            return told
        needed = math.ceil(self.batches * (error / self.tolerance) ** 2)
        return f"{told}; {number(self.tolerance)} would take about {count(needed, 'batch')}"

    def to_html(self) -> str:
        """Return the report as a page with plots: every layer, and the channels of the worst."""
        from stillnorm.reports import html

        return html.write(replace(self.document(), blocks=self.document().blocks + plots(self)))

    def to_json(self) -> str:
        """Return the report as JSON."""
        return dumps(self)

    def __str__(self) -> str:
        return text.write(self.document())


def _row(layer: Recalibrated) -> tuple[str, ...]:
    error = layer.standard_error
    return (
        layer.path or "(root)",
        str(layer.count),
        number(layer.mean_moved),
        number(layer.var_ratio),
        "-" if error is None else number(error),
    )


def _unsettled(layer: Recalibrated) -> float:
    """Rank layers by how far they moved; from NaN, farthest."""
    moved = max(layer.mean_moved, abs(math.log(layer.var_ratio)) if layer.var_ratio > 0 else 0.0)
    return math.inf if math.isnan(layer.mean_moved + layer.var_ratio) else moved


# ---------------------------------------------------------------------------------- plots


def plots(report: RecalibrationReport) -> tuple[Block, ...]:
    """Return how far every layer moved, and how far the channels of the worst did."""
    if not report.layers:
        return ()
    most = sorted(report.layers, key=_unsettled, reverse=True)[:_PLOTTED]
    moved = tuple(Bar(layer.path or "(root)", layer.mean_moved) for layer in report.layers)
    ratios = tuple(Bar(layer.path or "(root)", _log2(layer.var_ratio)) for layer in report.layers)
    return (
        Heading("Every layer, in the order of the model"),
        Bars("how far the mean moved, in deviations", moved),
        Bars("the new variance over the old, in doublings", ratios),
        Heading("The channels of those that moved most"),
        Histogram(
            "how far the mean moved, in deviations",
            tuple(_series(layer.path or "(root)", _moved(layer)) for layer in most),
        ),
    )


def _moved(layer: Recalibrated) -> Tensor:
    """Return how far the mean of each channel moved, in deviations."""
    moved = layer.mean_after.double() - layer.mean_before.double()
    return moved / (layer.var_after.double() + layer.eps).sqrt()


def _series(label: str, values: Tensor) -> Series:
    values = values[values.isfinite()].cpu()
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 0.0)
    if not high > low:
        low, high = low - 0.5, high + 0.5
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    counts = torch.histc(values, _BINS, low, high)
    return Series(label, tuple(edges.tolist()), tuple(counts.tolist()))


def _log2(ratio: float) -> float:
    return math.log2(ratio) if ratio > 0 else math.nan
