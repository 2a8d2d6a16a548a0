"""Write, run what was written beside the model, compare: the same for every format."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillnorm.diagnosis import Finding
from stillnorm.errors import BatchError, ExportError, StateError
from stillnorm.export.artifact import Artifact
from stillnorm.export.call import Call, doubled, size_of, unwrapped
from stillnorm.export.files import written_whole
from stillnorm.export.proving import must_repeat, proved
from stillnorm.export.refusal import (
    about_statistics,
    must_be_exportable,
    must_be_shapes,
    must_be_tensors,
    must_have_weights,
    must_not_use_the_batch,
    reaching,
)
from stillnorm.export.report import ExportReport, Format
from stillnorm.export.sizes import open_batch
from stillnorm.norms import keep_tensors, overrides_train
from stillnorm.norms.paths import walk
from stillnorm.state import attributes_kept, preserved
from stillnorm.tracing import Forward, Trace, call_example, first_line, trace

Dynamic = bool | dict[str, Any] | tuple[Any, ...] | list[Any]
Writer = Callable[[Call, Any, object, Path], Artifact]

# torch's exporters, and what keeps their output back, change state of the whole process.
_ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True, eq=False)
class Plan:
    """One way to export.

    Args:
        call: What the exporter is given.
        shapes: The `dynamic_shapes`; None for none.
        fixed: Why the batch size is fixed, if it turns out to be.
        asked: Whether the user has said which sizes are open, and in which range.
    """

    call: Call
    shapes: Any
    fixed: str
    asked: bool = False


def export(
    write: Writer,
    format: Format,
    model: nn.Module,
    example: object,
    target: Path,
    forward: Forward | None,
    dynamic: Dynamic,
) -> ExportReport:
    """Export a model; see `export_onnx`."""

    def run(model: nn.Module, example: object) -> object:
        return call_example(model, example, forward)

    must_be_shapes(dynamic)
    if forward is None and isinstance(example, Mapping):
        example = dict(example)  # of transformers' BatchEncoding too, which torch does not know
    model = unwrapped(model)
    must_have_weights(model)
    with _ONE_AT_A_TIME, _left_as_found(model), torch.inference_mode(False), torch.no_grad():
        with preserved(model):
            _to_eval(model)  # where that raises, it is said first
        findings = about_statistics(model)  # in the modes that it is found in
        _to_eval(model)
        seen, output = _seen(model, example, run)
        must_be_tensors(output, example, format)
        call = Call.of(model, example, forward)
        several, alone = _several(model, example, forward)
        must_be_exportable(model, several, run, seen.reached)
        must_repeat(call)
        plans = _plans(call, Call.of(model, several, forward), alone, dynamic)
        used = {one.path for one in seen.calls if one.used == "running"}
        written = functools.partial(
            _written, write, format, call, output, target, used, reaching(findings, seen.reached)
        )
        for plan in plans[:-1]:
            try:
                return written(plan)
            except ExportError as error:
                plans[-1] = Plan(call, None, error.fact)
        return written(plans[-1])


def _to_eval(model: nn.Module) -> None:
    """Call `eval()`, which may be the model's own.

    Raises:
        StateError: It raised.
    """
    try:
        model.eval()
    except Exception as error:
        raise StateError(
            f"eval() of the model raised {first_line(error)}",
            help="nothing was changed; the error above has the line",
        ) from error


@contextlib.contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Keep all of a model: also what a forward that is stopped halfway has noted in it.

    Where a `train()` is the model's own it may write to any parameter, and they are copied.
    """
    own = any(map(overrides_train, model.modules()))
    with (
        attributes_kept(model),
        keep_tensors(model.parameters() if own else ()),
        preserved(model),
    ):
        yield


def _seen(model: nn.Module, example: object, run: Forward) -> tuple[Trace, object]:
    """Return what the norms do on the example in eval mode, and the output.

    Raises:
        BatchError: The model cannot be called on it, or it has no samples.
    """
    if size_of(example) == 0:
        raise BatchError("the example has no samples", help="give one at least")
    outputs: list[object] = []
    try:
        seen = trace(model, iter([example]), forward=run, on_output=lambda y, _: outputs.append(y))
    except BatchError as error:
        fact = error.fact.replace("batch 0: ", "on the example, ", 1)
        raise BatchError(fact, help=error.help) from error
    return seen, outputs[0]


def _several(model: nn.Module, example: object, forward: Forward | None) -> tuple[object, str]:
    """Return the example with two samples at least, or why it has not."""
    size = size_of(example)
    if not size:
        return example, "no input has samples"
    if size > 1:
        return example, ""
    twice = doubled(example)
    try:
        with preserved(model):
            Call.of(model, twice, forward).run()
    except Exception as error:
        return example, f"the model does not take two samples ({first_line(error)})"
    return twice, ""


def _plans(call: Call, several: Call, alone: str, dynamic: Dynamic) -> list[Plan]:
    """Return what to try in turn.

    Args:
        call: The call on the example.
        several: The same on two samples at least: torch takes a size of one for a constant.
        alone: Why it has fewer.
        dynamic: What the user says.
    """
    if not isinstance(dynamic, bool):
        return [Plan(call, dynamic, "it is not among the open sizes", asked=True)]
    if not dynamic:
        return [Plan(call, None, "as asked")]
    if alone:
        return [Plan(call, None, alone)]
    shapes = open_batch(several, size_of(several.leaves) or 0)
    return [Plan(several, shapes, "the forward makes it a constant"), Plan(call, None, "")]


def _written(
    write: Writer,
    format: Format,
    call: Call,
    output: object,
    target: Path,
    used: set[str],
    findings: tuple[Finding, ...],
    plan: Plan,
) -> ExportReport:
    """Write a file in one way, prove that it is right, and put it in its place."""
    # A forward may count in its buffers: what is tried next starts from where this did.
    with written_whole(target) as path, preserved(call.module):
        artifact = write(plan.call, plan.shapes, output, path)
        if any(norm.uses == "batch" for norm in artifact.stored.norms):
            must_not_use_the_batch(path)
        runs = proved(artifact, call, asked=plan.asked)
        beside = [p for p in path.parent.iterdir() if p != path]
        total = sum(p.stat().st_size for p in (path, *beside))
    paths = _paths(call, (norm.path for norm in artifact.stored.norms))
    return ExportReport(
        path=target,
        format=format,
        opset=artifact.opset,
        inputs=artifact.inputs,
        outputs=artifact.outputs,
        fixed_batch="" if artifact.opened else plan.fixed,
        remaining=tuple(paths),
        absorbed=tuple(sorted(used.difference(paths))),
        runs=runs,
        size=total,
        data=target.parent / beside[0].name if beside else None,
        findings=findings,
    )


def _paths(call: Call, stored: Iterable[str]) -> list[str]:
    """Return paths in a file as reports have them: of a shared layer torch takes another name."""
    named = dict(call.module.named_modules(remove_duplicate=False))
    paths: dict[nn.Module | None, str] = {}
    for path, module, _ in walk(call.model):
        paths.setdefault(module, path)
    return [paths.get(named.get(name), name) for name in stored]
