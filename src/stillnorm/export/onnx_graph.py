"""ONNX: torch's exporter writes it, onnxruntime runs it. The only file that needs either."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillnorm.diagnosis.files.onnx_file import read_onnx
from stillnorm.errors import ExportError
from stillnorm.export.artifact import Artifact, Shapes, exporting
from stillnorm.export.call import Call, dynamic_inputs
from stillnorm.export.report import Port
from stillnorm.tracing import first_line

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def must_be_installed() -> None:
    """Raise unless the packages of the extra are there.

    Raises:
        ExportError: One of them is not installed.
    """
    for name in _PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(
                f"exporting to ONNX needs the package {name}, which cannot be imported",
                help="pip install 'stillnorm[onnx]'",
            ) from error


def write_onnx(call: Call, shapes: Shapes, path: Path) -> Artifact:
    """Export a call and write it.

    Raises:
        ExportError: torch cannot export it, or onnxruntime does not take what came of it.
    """
    with exporting("torch.onnx.export"):
        # The last of the arguments are the keyword arguments, of which there may be none: a
        # mapping that is a positional argument would be taken for them.
        program = torch.onnx.export(
            call.module,
            (*call.args, call.kwargs),
            dynamic_shapes=shapes,
            dynamo=True,
            verbose=False,
        )
        if program is None or program.exported_program is None:
            raise ExportError("torch.onnx.export returned no program")
        exported = program.exported_program
        opened = dynamic_inputs(exported, call)
        program.rename_axes(dict.fromkeys(map(str, opened.values()), "batch"))
        program.save(str(path))
    session = _session(path)
    taken = [port.name for port in session.get_inputs()]
    names = [str(name) for name in exported.graph_signature.user_inputs]

    def run(other: Call) -> list[Tensor]:
        given = {
            name: _array(leaf)
            for name, leaf in zip(names, other.leaves, strict=True)
            if name in taken
        }
        with exporting("onnxruntime"):
            return [torch.from_numpy(array) for array in session.run(None, given)]

    return Artifact(
        exported,
        {entry.domain: entry.version for entry in _header(path).opset_import}.get(""),
        _ports(session.get_inputs()),
        _ports(session.get_outputs()),
        opened,
        read_onnx(path),
        run,
    )


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    with exporting("onnxruntime"):
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _header(path: Path) -> Any:
    import onnx

    return onnx.load(str(path), load_external_data=False)


def _array(leaf: Any) -> Any:
    try:
        return leaf.detach().cpu().contiguous().numpy()
    except (AttributeError, TypeError) as error:
        raise ExportError(
            f"an input cannot be handed to onnxruntime: {first_line(error)}",
            help="model.float() and a float32 example are what it runs everywhere",
        ) from error


def _ports(values: Any) -> tuple[Port, ...]:
    return tuple(
        Port(
            v.name,
            _DTYPES.get(v.type, v.type),
            tuple(s or "?" if s is None else s for s in v.shape),
        )
        for v in values
    )


_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bfloat16)": "bfloat16",
    "tensor(bool)": "bool",
    **{f"tensor({kind})": kind for kind in ("int8", "int16", "int32", "int64", "uint8")},
}
