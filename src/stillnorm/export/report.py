"""What an export wrote, and how far it is off."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from stillnorm.diagnosis import Finding
from stillnorm.diagnosis.finding import listed
from stillnorm.export.compare import OutputError
from stillnorm.reports import Block, Document, Line, Span, Table, json, text
from stillnorm.reports.numbers import short, size

Format = Literal["ONNX graph", "exported program"]


# How a norm is computed that is no batch norm in the file.
_ABSORBED: dict[Format, str] = {
    "ONNX graph": "folded into weights or written as other operations",
    "exported program": "written as other operations",
}


@dataclass(frozen=True)
class Port:
    """An input or an output of the file.

    Args:
        name: Its name.
        dtype: Its dtype: ``"float32"``.
        shape: Its sizes; a name where any size will do.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} ({', '.join(map(str, self.shape))})"


@dataclass(frozen=True)
class Run:
    """One run of the file beside the model in eval mode.

    Args:
        batch_size: The number of samples; None where no input has any.
        errors: How far each output was off.
        constant: Names of outputs that were one number throughout, in all samples.
    """

    batch_size: int | None
    errors: tuple[OutputError, ...]
    constant: tuple[str, ...] = ()

    @property
    def max_error(self) -> float:
        """The largest difference, relative to the largest value of its output."""
        return max((error.max for error in self.errors), default=0.0)

    @property
    def rms_error(self) -> float:
        """The largest root mean square of a difference, relative to that of its output."""
        return max((error.rms for error in self.errors), default=0.0)


@dataclass(frozen=True)
class ExportReport:
    """What `export_onnx` and `export_program` did.

    Args:
        path: The file.
        format: What it is.
        opset: The version of ONNX's operators; None for a program.
        inputs: What it takes.
        outputs: What it gives.
        fixed_batch: Why its batch size is that of the example; empty where others do.
        remaining: Paths of the norm layers that are batch norms in the file, all of them by running
            statistics.
        absorbed: Paths of those that are not: the exporter has folded them into the weights beside
            them (ONNX), or they are written as other operations: additions, multiplications.
        runs: What was run, by batch size; the example's first.
        size: Bytes on disk, with the file of its large tensors.
        data: Where large tensors lie (ONNX above 2 GB); None where they are in the file itself.
        findings: What `check` says of the statistics without data. The file is right beside the
            model; with such statistics the model itself is not.
    """

    path: Path
    format: Format
    opset: int | None
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    fixed_batch: str
    remaining: tuple[str, ...]
    absorbed: tuple[str, ...]
    runs: tuple[Run, ...]
    size: int
    data: Path | None
    findings: tuple[Finding, ...] = ()

    @property
    def constant(self) -> tuple[str, ...]:
        """Names of outputs that were one number throughout in every run: they prove little."""
        first = self.runs[0].constant
        return tuple(name for name in first if all(name in run.constant for run in self.runs))

    @property
    def untried(self) -> tuple[str, ...]:
        """Names of open sizes that are no batch size: nothing was run at another value of them."""
        shapes = [port.shape for port in self.inputs]
        names = dict.fromkeys(size for shape in shapes for size in shape if isinstance(size, str))
        if len(self.runs) > 1:
            names.pop(next(shape[0] for shape in shapes if shape and isinstance(shape[0], str)))
        return tuple(names)

    @property
    def max_error(self) -> float:
        """The largest difference in any run, relative to the largest value of its output."""
        return max(run.max_error for run in self.runs)

    @property
    def rms_error(self) -> float:
        """The largest root mean square of a difference, relative to that of its output."""
        return max(run.rms_error for run in self.runs)

    def document(self) -> Document:
        """Return the report as a document."""
        opset = "" if self.opset is None else f", opset {self.opset}"
        norms = f"{len(self.remaining)} as batch norms"
        if self.absorbed:
            norms += f", {len(self.absorbed)} {_ABSORBED[self.format]}"
        blocks: list[Block] = [
            Line(f"{self.format}{opset}, {size(self.size)}"),
            Line(f"norms: {norms}"),
            Line(f"takes {', '.join(map(str, self.inputs)) or 'nothing'}"),
            Line(f"gives {', '.join(map(str, self.outputs)) or 'nothing'}"),
        ]
        if self.data is not None:
            blocks.append(Line(f"keep {self.data.name} beside it: its tensors lie there"))
        if self.fixed_batch:
            blocks.append(Line(f"the batch size is fixed: {self.fixed_batch}"))
        if self.untried:
            blocks.append(Line(f"open, and not tried at other values: {', '.join(self.untried)}"))
        blocks.extend(map(Line, map(_says_little, self.constant)))
        for finding in self.findings:
            said = f" {finding.code} {finding.slug}: {finding.message}: {listed(finding.paths)}"
            blocks.append(Line((Span(finding.severity, finding.severity), said)))
            blocks.append(Line(f"help: {finding.help}", indent=2))
        rows = tuple(
            (str(run.batch_size or "-"), error.name, short(error.max), short(error.rms))
            for run in self.runs
            for error in run.errors
        )
        header = ("batch size", "output", "max error / max value", "rms error / rms value")
        head = f"{self.path.name} computes what the model does in eval mode"
        return Document(head, (*blocks, Line(""), Table(header, rows, "rlrr")))

    def to_json(self) -> str:
        """Return it as JSON."""
        return json.dumps(
            {
                **{field.name: getattr(self, field.name) for field in fields(self)},
                "findings": [replace(finding, table=None) for finding in self.findings],
            }
        )

    def __str__(self) -> str:
        return text.write(self.document())


def _says_little(output: str) -> str:
    return (
        f"{output} is one number throughout, in all samples: that the file has it too says little; "
        "try another example"
    )
