"""Programs of `torch.export`: written, loaded again, and run."""

from __future__ import annotations

import io
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ConstantArgument,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)
from torch.utils._pytree import tree_map

from stillnorm.diagnosis.files.pt2_file import read_pt2
from stillnorm.export.artifact import Artifact, exporting
from stillnorm.export.call import Call, numbers
from stillnorm.export.names import input_names, output_names
from stillnorm.export.report import Port
from stillnorm.export.sizes import opened
from stillnorm.tracing import copied


def write_program(call: Call, shapes: Any, output: object, path: Path) -> Artifact:
    """Export a call and write it; `output` is what the model returns.

    Raises:
        ExportError: torch cannot export it, or cannot save or load what came of it.
    """
    with exporting("torch.export"):
        program = torch.export.export(
            call.module, call.args, call.kwargs, dynamic_shapes=shapes, strict=False
        )
        # By way of memory: torch's own writing ends the process where the disk is full.
        archive = io.BytesIO()
        torch.export.save(program, archive)
        path.write_bytes(archive.getbuffer())
        loaded = torch.export.load(path)  # what was just written, of the user's own model
        module = loaded.module()

    def run(other: Call) -> list[Tensor]:
        args, kwargs = tree_map(copied, (other.args, other.kwargs))
        with exporting("the exported program"):
            output = module(*args, **kwargs)
        return numbers(output)

    signature = loaded.graph_signature
    inputs = [s.arg for s in signature.input_specs if s.kind.name == "USER_INPUT"]
    outputs = [s.arg for s in signature.output_specs if s.kind.name == "USER_OUTPUT"]
    sizes = opened(program, call)
    return Artifact(
        program,
        None,
        _ports(loaded, input_names(call), inputs, sizes.values()),
        _ports(loaded, output_names(output), outputs, sizes.values()),
        sizes,
        read_pt2(path),
        run,
    )


def _ports(
    program: ExportedProgram,
    names: list[str],
    arguments: list[Any],
    opened: Collection[torch.SymInt],
) -> tuple[Port, ...]:
    """Describe inputs or outputs; torch's own names of open batch sizes (s77) are `batch`."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    ours = "|".join(name for name in map(str, opened) if re.fullmatch(r"s\d+", name))
    ports = []
    for name, argument in zip(names, arguments, strict=False):  # the comparison counts them
        value = values.get(argument.name)
        if isinstance(argument, TensorArgument) and isinstance(value, Tensor):
            shape = tuple(
                size
                if isinstance(size, int)
                else re.sub(rf"\b({ours})\b" if ours else r"(?!)", "batch", str(size))
                for size in value.shape
            )
            ports.append(Port(name, str(value.dtype).removeprefix("torch."), shape))
        elif kind := _number(argument):
            ports.append(Port(name, kind, ()))
    return tuple(ports)


def _number(argument: Any) -> str:
    """Return of which kind a number is; empty for anything else (None, a string)."""
    if isinstance(argument, ConstantArgument):
        return (
            type(argument.value).__name__ if isinstance(argument.value, bool | int | float) else ""
        )
    kinds = ((SymBoolArgument, "bool"), (SymIntArgument, "int"), (SymFloatArgument, "float"))
    return next((kind for of, kind in kinds if isinstance(argument, of)), "")
