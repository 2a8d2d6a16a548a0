"""ONNX graphs: the batch norms in one, what they normalise by, and their statistics.

A batch norm is in training mode by an attribute (opset 14 on), by its further outputs (7 to 13), or
by the absence of ``is_test`` (before). It also normalises by the batch where its mean is computed
from the data: that is how exporters write layers that keep no statistics.

Source: the changelog of BatchNormalization in onnx/onnx, docs/Changelog.md.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillnorm.diagnosis.files.skeleton import Stored, StoredNorm, matching, merged
from stillnorm.errors import FileFormatError
from stillnorm.norms import NormalizesBy
from stillnorm.state.files import must_be_file

_INPUTS = ("weight", "bias", "running_mean", "running_var")
_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch's exporter writes the modules' paths
_NAME = re.compile(r"/?(.+)/BatchNormalization(_\d+)?")  # of a node, by the exporter before it


def read_onnx(path: Path) -> Stored:
    """Read the batch norms of an ONNX file; only their tensors are loaded.

    Raises:
        FileFormatError: It is no ONNX file, its data are missing, or `onnx` is not installed.
    """
    must_be_file(path)
    try:
        import onnx
    except ImportError as error:
        raise FileFormatError(
            f"{path} cannot be read without the package onnx", help="pip install onnx"
        ) from error
    try:
        model = onnx.load(str(path), load_external_data=False)
        norms = _all_norms(model, path)
    except FileFormatError:
        raise
    except Exception as error:  # protobuf's, which differ by its version, or a malformed graph's
        raise FileFormatError(
            f"{path} is not a whole ONNX file",
            help="it may be damaged or cut short: copy or export it again",
        ) from error
    return Stored(path.name, "ONNX graph", merged(norms))


def _all_norms(model: Any, path: Path) -> list[StoredNorm]:
    """Return the batch norms of the graph and of the functions that it calls."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    if not versions:
        raise ValueError("any bytes may be a protobuf message, but without this it is no model")
    opset = versions.get("", versions.get("ai.onnx", 1))
    norms = [*_norms(_Graph([*_graphs(model.graph)], path), opset)]
    for function in model.functions:
        own = {entry.domain: entry.version for entry in function.opset_import}
        inside = [function, *(g for node in function.node for g in _inner(node))]
        norms += _norms(_Graph(inside, path), own.get("", opset), f"{function.name}/")
    return norms


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and those inside its nodes: branches and bodies of loops."""
    yield graph
    for node in graph.node:
        yield from _inner(node)


def _inner(node: Any) -> Iterator[Any]:
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            yield from _graphs(graph)


class _Graph:
    """What makes each name of a graph and of the graphs inside it; their names are unique.

    Args:
        graphs: The graphs, or a function.
        path: The file, beside which large tensors lie.
    """

    def __init__(self, graphs: list[Any], path: Path) -> None:
        self.nodes = [node for graph in graphs for node in graph.node]
        self.made_by = {name: node for node in self.nodes for name in node.output if name}
        self.initial = {t.name: t for graph in graphs for t in getattr(graph, "initializer", ())}
        self._path = path
        self._constant: dict[str, bool] = {}

    def is_constant(self, name: str) -> bool:
        """Tell whether a value is computed from stored tensors alone."""
        todo = [name]  # a stack: graphs are deeper than Python's recursion
        while todo:
            here = todo.pop()
            if here in self.initial or here not in self.made_by:
                self._constant[here] = here in self.initial or not here
                continue
            node = self.made_by[here]
            unknown = [x for x in node.input if x not in self._constant]
            if unknown and here not in self._constant:
                self._constant[here] = False  # until its inputs are known; for ever in a circle
                todo += [here, *unknown]
            else:
                own = node.op_type not in ("If", "Loop", "Scan")
                self._constant[here] = own and all(self._constant.get(x) for x in node.input)
        return self._constant[name]

    def is_computed(self, name: str) -> bool:
        """Tell whether a value comes from the data through some node."""
        return name in self.made_by and not self.is_constant(name)

    def value(self, name: str) -> Tensor | None:
        """Return a stored tensor; None where the name is none of them."""
        import onnx

        for _ in range(len(self.made_by)):
            if name not in self.made_by or self.made_by[name].op_type != "Identity":
                break
            name = self.made_by[name].input[0]
        stored = self.initial.get(name)
        if stored is None and (node := self.made_by.get(name)) and node.op_type == "Constant":
            stored = next((a.t for a in node.attribute if a.name == "value"), None)
        if stored is None:
            return None
        try:
            array = onnx.numpy_helper.to_array(stored, base_dir=str(self._path.parent))
        except Exception as error:
            raise FileFormatError(
                f"{name} of {self._path} cannot be read: {type(error).__name__}",
                help="large tensors lie in a file of their own: keep it beside the .onnx",
            ) from error
        if stored.data_type == onnx.TensorProto.BFLOAT16:
            return torch.from_numpy(array.astype("float32")).bfloat16()
        return torch.from_numpy(array.copy())

    def is_one_sample(self, name: str) -> bool:
        """Tell whether a value is made into a batch of one: instance norm by way of batch norm."""
        node = self.made_by.get(name)
        if node is None or node.op_type != "Reshape":
            return False
        shape = self.value(node.input[1])
        return shape is not None and shape.flatten().tolist()[:1] == [1]


def _norms(graph: _Graph, opset: int, within: str = "") -> Iterator[StoredNorm]:
    for node in graph.nodes:
        if node.op_type != "BatchNormalization" or node.domain not in ("", "ai.onnx"):
            continue
        x, *names = node.input
        if graph.is_constant(x):
            continue  # weight standardisation
        settings = {attribute.name: attribute for attribute in node.attribute}
        tensors = {part: graph.value(name) for part, name in zip(_INPUTS, names, strict=False)}
        uses: NormalizesBy = "running"
        if _is_training(node, settings, opset) or graph.is_computed(names[2]):
            uses = "sample" if graph.is_one_sample(x) else "batch"
        yield StoredNorm(
            within + _path(node, names[2]),
            matching({part: t for part, t in tensors.items() if t is not None}),
            float(f"{settings['epsilon'].f:.6g}") if "epsilon" in settings else 1e-5,
            uses,
        )


def _is_training(node: Any, settings: dict[str, Any], opset: int) -> bool:
    if opset >= 14:
        return "training_mode" in settings and settings["training_mode"].i == 1
    if opset >= 7:
        return sum(map(bool, node.output)) > 1
    return "is_test" not in settings or settings["is_test"].i == 0


def _path(node: Any, mean: str) -> str:
    """Return the module's path, as far as the exporter wrote it, or else the node's name."""
    if mean.endswith(".running_mean"):
        return mean.removesuffix(".running_mean")
    for said in _said(getattr(node, "metadata_props", ())):  # from onnx 1.16 on
        return said
    if match := _NAME.fullmatch(node.name):
        return match[1].replace("/", ".")
    return str(node.name or node.output[0])


def _said(properties: Iterable[Any]) -> Iterator[str]:
    for entry in properties:
        if entry.key == _SCOPES:
            try:
                *_, module, _ = ast.literal_eval(entry.value)
            except (ValueError, SyntaxError, TypeError):
                continue
            if isinstance(module, str) and module:
                yield module
