"""What speaks against exporting a model, as `check` finds it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from stillnorm.diagnosis import Finding, check
from stillnorm.diagnosis.finding import listed
from stillnorm.errors import ExportError, StateError
from stillnorm.export.report import Format
from stillnorm.norms import must_be_a_model
from stillnorm.tracing import Forward

_AGAINST = ("SN007", "SN102", "SN103", "SN107")

# What is told and exported all the same: statistics that are not those of the data.
_STATISTICS = ("SN004", "SN008", "SN101", "SN104", "SN112", "SN115", "SN202")


def must_be_shapes(dynamic: object) -> None:
    """Raise where `dynamic` is neither yes nor no nor shapes; what else they are torch says.

    Raises:
        ExportError: It is a number or a name.
    """
    if isinstance(dynamic, str | int | float) and not isinstance(dynamic, bool):
        raise ExportError(
            f"dynamic={dynamic!r} is not True, False or shapes",
            help="shapes are as torch.export.export takes them: ({0: torch.export.Dim('n')},)",
        )


def must_have_weights(model: nn.Module) -> None:
    """Raise where there is nothing to export.

    Raises:
        ModelError: It is no model of torch's.
        StateError: It is TorchScript's, or its weights have no values.
    """
    must_be_a_model(model)
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise StateError(
            "the model is TorchScript's, which keeps its own modes: nothing of it is exported",
            help="use the Python model, before torch.jit.script or torch.jit.trace",
        )
    named = (*model.named_parameters(), *model.named_buffers())
    if empty := next((name for name, tensor in named if tensor.is_meta), None):
        raise StateError(
            f"{empty} is on the meta device: it has no values",
            help="model.to_empty(device='cpu'), then load its weights",
        )


def must_be_exportable(
    model: nn.Module, example: object, forward: Forward, reached: Collection[str]
) -> None:
    """Raise where no file could be right.

    Args:
        model: The model.
        example: Two samples or more: one alone does not show what depends on the batch.
        forward: ``(model, example) -> output``.
        reached: The layers that the example reaches; others are not in the file.

    Raises:
        ExportError: The eval output depends on what else is in the batch, or statistics are not
            finite, or negative.
    """
    report = check(model, iter([example]), forward=forward, select=_AGAINST)
    against = [f for f in report.findings if _is_about(f, reached)]
    if against:
        raise _refusal(against)


def about_statistics(model: nn.Module) -> tuple[Finding, ...]:
    """Return what the state of a model alone says against its statistics; it is as found."""
    return check(model, select=_STATISTICS).findings


def reaching(findings: Iterable[Finding], reached: Collection[str]) -> tuple[Finding, ...]:
    """Return the findings about layers that the example reaches; others are not in the file."""
    return tuple(f for f in findings if not set(reached).isdisjoint(f.paths))


def _is_about(finding: Finding, reached: Collection[str]) -> bool:
    if finding.code == "SN007":  # of what ran; but for a train() that returns nothing
        return finding.evidence.get("kind") != "no return"
    return not set(reached).isdisjoint(finding.paths)


# What may be among the outputs beside tensors.
_ALSO: dict[Format, tuple[type, ...]] = {
    "ONNX graph": (type(None),),
    "exported program": (bool, int, float, type(None)),
}


def must_be_tensors(output: object, example: object, format: Format) -> None:
    """Raise where inputs or outputs are none that a file can take and return.

    Raises:
        ExportError: No output is a tensor, so that nothing can be compared, or one is of a class
            that the format does not know, or complex, which ONNX does not know.
    """
    onnx = format == "ONNX graph"
    leaves = tree_leaves(output)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_ALSO[format])):
            kind = type(leaf).__name__
            raise ExportError(
                f"the model returns {kind} in its {type(output).__name__}, which no graph can"
                if leaf is not output
                else f"the model returns {kind}, which no graph can",
                help="forward=lambda model, example: ... that returns the tensors alone",
            )
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ExportError(
            "the model returns no tensor: there is nothing to compare",
            help="forward=lambda model, example: ... that returns one",
        )
    for does, tree in (("takes", tree_leaves(example)), ("returns", leaves)):
        kinds = [leaf.dtype for leaf in tree if isinstance(leaf, Tensor) and leaf.is_complex()]
        if onnx and kinds:
            raise ExportError(
                f"the model {does} {str(kinds[0]).removeprefix('torch.')}, which ONNX does not",
                help="torch.view_as_real and view_as_complex, in forward= or in the model",
            )


def must_not_use_the_batch(file: Path) -> None:
    """Raise when a norm in a file normalises by the batch.

    Raises:
        ExportError: One does.
    """
    if findings := check(file, select="SN701").findings:
        raise _refusal(findings)


def _refusal(findings: Iterable[Finding]) -> ExportError:
    """Return the error that tells the findings, the first of them in full."""
    first, *others = findings
    more = f" (and {', '.join(finding.code for finding in others)})" if others else ""
    layers = f"layer{'s' if len(first.paths) > 1 else ''} {listed(first.paths)}"
    return ExportError(
        f"{first.code} {first.slug}: {first.message}; {layers}{more}",
        help=first.help,
        findings=(first, *others),
    )
