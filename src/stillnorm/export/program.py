"""Programs of `torch.export`: written, loaded again, and run."""

from __future__ import annotations

import io
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
from stillnorm.export.report import Port
from stillnorm.export.sizes import opened
from stillnorm.tracing import copied


def write_program(call: Call, shapes: Any, path: Path) -> Artifact:
    """Export a call and write it.

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
    return Artifact(
        program,
        None,
        _ports(loaded, inputs),
        _ports(loaded, outputs),
        opened(program, call),
        read_pt2(path),
        run,
    )


def _ports(program: ExportedProgram, arguments: list[Any]) -> tuple[Port, ...]:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    ports = []
    for argument in arguments:
        value = values.get(argument.name)
        if isinstance(argument, TensorArgument) and isinstance(value, Tensor):
            shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
            ports.append(Port(argument.name, str(value.dtype).removeprefix("torch."), shape))
        elif kind := _number(argument):
            ports.append(Port(argument.name or f"constant_{len(ports)}", kind, ()))
    return tuple(ports)


def _number(argument: Any) -> str:
    """Return of which kind a number is; empty for anything else (None, a string)."""
    if isinstance(argument, ConstantArgument):
        return (
            type(argument.value).__name__ if isinstance(argument.value, bool | int | float) else ""
        )
    kinds = ((SymBoolArgument, "bool"), (SymIntArgument, "int"), (SymFloatArgument, "float"))
    return next((kind for of, kind in kinds if isinstance(argument, of)), "")
