"""ONNX: torch's exporter writes it, onnxruntime runs it. The only file that needs either."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from stillnorm.diagnosis.files.onnx_file import read_onnx
from stillnorm.errors import ExportError
from stillnorm.export.artifact import Artifact, exporting
from stillnorm.export.call import Call
from stillnorm.export.names import input_names, output_names, unique
from stillnorm.export.report import Port
from stillnorm.export.sizes import opened
from stillnorm.tracing import first_line

_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


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


def write_onnx(call: Call, shapes: Any, output: object, path: Path) -> Artifact:
    """Export a call and write it; `output` is what the model returns.

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
        sizes = opened(exported, call)
        ours = [name for name in map(str, sizes.values()) if re.fullmatch(r"s\d+", name)]
        if ours and hasattr(program, "rename_axes"):  # torch 2.9 on; others are the user's names
            program.rename_axes(dict.fromkeys(ours, "batch"))
        _rename(program, call, output)
        program.save(str(path))
    runtime = _runtime(path)
    names = [port.name for port in runtime.get_inputs()]

    def run(other: Call) -> list[Tensor]:
        tensors = [leaf for leaf in other.leaves if isinstance(leaf, Tensor)]
        with _running():
            given = {name: _array(x) for name, x in zip(names, tensors, strict=True)}
            return [torch.from_numpy(array) for array in runtime.run(None, given)]

    return Artifact(
        exported,
        {entry.domain: entry.version for entry in _header(path).opset_import}.get(""),
        _ports(runtime.get_inputs()),
        _ports(runtime.get_outputs()),
        sizes,
        read_onnx(path),
        run,
    )


def _rename(program: Any, call: Call, output: object) -> None:
    """Name inputs and outputs after what the model takes and returns.

    `input_names` and `output_names` of torch.onnx.export set the same names, and leave others of
    the graph that are the same: no reader takes such a file.
    """
    from onnx_ir.passes.common import NameFixPass

    graph = program.model.graph
    inputs = _of_tensors(input_names(call), call.leaves)
    # An output may be a weight; its name cannot be another weight's.
    weights = graph.initializers if any(v.is_initializer() for v in graph.outputs) else ()
    outputs = unique(_of_tensors(output_names(output), tree_leaves(output)), {*inputs, *weights})
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, name in zip(values, names, strict=False):  # the comparison counts them
            value.name = name
    NameFixPass()(program.model)  # which leaves inputs and outputs as they are


def _of_tensors(names: list[str], leaves: list[Any]) -> list[str]:
    return [name for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)]


def _runtime(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    with _running():
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _header(path: Path) -> Any:
    import onnx

    return onnx.load(str(path), load_external_data=False)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().contiguous().numpy()


@contextlib.contextmanager
def _running() -> Iterator[None]:
    """Turn what onnxruntime raises into one line.

    Raises:
        ExportError: Something was raised.
    """
    try:
        yield
    except Exception as error:
        raise ExportError(
            f"onnxruntime does not run the file: {first_line(error)[:300]}",
            help="on the CPU it runs float32 throughout, and other dtypes in some operators: "
            "model.float(), or another batch size with dynamic=False",
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
