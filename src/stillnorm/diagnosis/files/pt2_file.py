"""Programs of `torch.export`: the batch norms in one, what they normalise by, their statistics.

``torch.export.load`` may unpickle, so it is not called. The graph is JSON in a zip archive; tensors
are raw bytes beside it, or in archives before torch 2.9 a file of `torch.save`.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillnorm.diagnosis.files.skeleton import Stored, StoredNorm, matching, merged
from stillnorm.errors import FileFormatError
from stillnorm.norms import NormalizesBy
from stillnorm.state.files import must_be_file, read_pickled

MAJOR = 8  # of the schema of the graph, which this file knows

_INPUTS = ("weight", "bias", "running_mean", "running_var")
_NEVER = ("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
_ALWAYS = ("_batch_norm_with_update", "_batch_norm_with_update_functional")
_ASKED = (
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "_batch_norm_impl_index",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)
_INSTANCE = "instance_norm"
_DTYPES = {5: torch.int64, 6: torch.float16, 7: torch.float32, 8: torch.float64, 13: torch.bfloat16}
_OLD_GRAPH, _OLD_STATE = "serialized_exported_program.json", "serialized_state_dict.pt"


def read_pt2(path: Path) -> Stored:
    """Read the batch norms of an exported program; only their tensors are loaded.

    Raises:
        FileFormatError: It is no archive of `torch.export.save`, or of a version not known here.
    """
    must_be_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return Stored(path.name, "exported program", merged(_norms(archive, path)))
    except FileFormatError:
        raise
    except Exception as error:  # zipfile's, of which a damaged archive raises many
        raise FileFormatError(
            f"{path} is not a whole archive of torch.export.save",
            help="it may be damaged or cut short: copy or export it again",
        ) from error


def _norms(archive: zipfile.ZipFile, path: Path) -> Iterator[StoredNorm]:
    names = {_inside(name): name for name in archive.namelist()}
    graphs = [n for n in names if n.startswith("models/") and n.endswith(".json")]
    graphs = graphs or [n for n in names if n == _OLD_GRAPH]
    if not graphs:
        raise FileFormatError(
            f"{path} holds no graph of torch.export", help="compiled packages cannot be read"
        )
    for graph in graphs:
        program: Any = None
        model = "" if graph == _OLD_GRAPH else Path(graph).stem
        try:
            program = json.loads(archive.read(names[graph]))
            version = int(program["schema_version"]["major"])
            if version > MAJOR:
                raise FileFormatError(
                    f"{path} has version {version} of the format, and {MAJOR} is the last known",
                    help="update stillnorm",
                )
            weights = _Weights(archive, names, model, path)
            found = list(_norms_of(program["graph_module"], weights))
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            if isinstance(error, FileFormatError):
                raise
            said = program.get("torch_version") if isinstance(program, dict) else None
            raise FileFormatError(
                f"{path} is of a version that cannot be read (torch {said or 'unknown'})",
                help="export it again with the present torch",
            ) from error
        within = f"{model}." if len(graphs) > 1 else ""
        yield from (replace(norm, path=within + norm.path) for norm in found)


def _inside(name: str) -> str:
    """Drop the folder around everything, which is named after the file."""
    return name if name in (_OLD_GRAPH, _OLD_STATE) else name.partition("/")[2]


def _norms_of(module: dict[str, Any], weights: _Weights) -> Iterator[StoredNorm]:
    sources = _sources(module["signature"]["input_specs"])
    for node, graph in _nodes(module["graph"]):
        op, _, overload = node["target"].removeprefix("torch.ops.aten.").partition(".")
        if op not in (*_NEVER, *_ALWAYS, *_ASKED, _INSTANCE):
            continue
        given = {entry["name"]: entry["arg"] for entry in node["inputs"]}
        keys = {part: sources.get(_tensor(given.get(part))) for part in _INPUTS}
        tensors = {part: weights.read(key) for part, key in keys.items() if key is not None}
        uses: NormalizesBy = "running"
        if _asks_for_input(op, overload, given):
            alone = op == _INSTANCE or _is_one_sample(_tensor(given["input"]), graph)
            uses = "sample" if alone else "batch"
            if alone and not _has_statistics(overload, given):
                continue  # instance norm, or weight standardisation
        yield StoredNorm(
            _path(keys["running_mean"], node),
            matching({part: t for part, t in tensors.items() if t is not None}),
            float(given.get("eps", {}).get("as_float", math.nan)),
            uses,
        )


def _asks_for_input(op: str, overload: str, given: dict[str, Any]) -> bool:
    """Tell whether an operation normalises by its input, not by running statistics."""
    if op in _NEVER:
        return False
    flag = "use_input_stats" if op == _INSTANCE else "training"
    asked = bool(given.get(flag, {}).get("as_bool", False))
    return op in _ALWAYS or asked or not _has_statistics(overload, given)


def _has_statistics(overload: str, given: dict[str, Any]) -> bool:
    return overload != "no_stats" and _tensor(given.get("running_mean")) != ""


def _nodes(graph: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the nodes of a graph and of the graphs inside it, each with its own graph."""
    for node in graph["nodes"]:
        yield node, graph
        for entry in node["inputs"]:
            if isinstance(inner := entry["arg"].get("as_graph"), dict):
                yield from _nodes(inner["graph"])


def _sources(specs: list[dict[str, Any]]) -> dict[str, str]:
    """Map the names in the graph to the keys of the state dict."""
    found = {}
    for spec in specs:
        for kind in ("parameter", "buffer"):
            if kind in spec:
                found[spec[kind]["arg"]["name"]] = spec[kind][f"{kind}_name"]
    return found


def _tensor(argument: dict[str, Any] | None) -> str:
    """Return the name of a tensor argument; empty for none."""
    for kind in ("as_tensor", "as_optional_tensor"):
        if argument and isinstance(value := argument.get(kind), dict):
            return str(value.get("name") or _tensor(value))
    return ""


def _is_one_sample(name: str, graph: dict[str, Any]) -> bool:
    """Tell whether a tensor is made into a batch of one.

    That is how instance norm and weight standardisation call batch norm: nothing is mixed.
    """
    sizes = graph["tensor_values"].get(name, {}).get("sizes", [])
    if sizes[:1] != [{"as_int": 1}]:
        return False
    made = (n for n in graph["nodes"] for out in n["outputs"] if _tensor(out) == name)
    return any("view" in node["target"] or "reshape" in node["target"] for node in made)


def _path(mean: str | None, node: dict[str, Any]) -> str:
    """Return the module's path, by its statistics or by what the exporter wrote."""
    if mean is not None and f".{mean}".endswith(".running_mean"):
        return mean.removesuffix("running_mean").removesuffix(".")
    *_, innermost = (node.get("metadata") or {}).get("nn_module_stack", "").split(";")
    said = innermost.split(",")[1:2]
    return said[0] if said and said[0] else _tensor(node["outputs"][0])


class _Weights:
    """The parameters and buffers in an archive.

    Args:
        archive: The archive.
        names: The names in it, by what they are without the outermost folder.
        model: Which model's; empty for archives before torch 2.8.
        path: The file, for errors.
    """

    def __init__(
        self, archive: zipfile.ZipFile, names: Mapping[str, str], model: str, path: Path
    ) -> None:
        self._archive, self._names = archive, names
        self._config: dict[str, Any] = {}
        self._state: dict[str, Tensor] = {}
        if (config := f"data/weights/{model}_weights_config.json") in names:
            self._config = json.loads(archive.read(names[config]))["config"]
            return
        whole = next((n for n in (_OLD_STATE, f"data/weights/{model}.pt") if n in names), None)
        if whole is not None:
            state = read_pickled(path, io.BytesIO(archive.read(names[whole])))
            items = state.items() if isinstance(state, Mapping) else ()
            self._state = {key: t.detach() for key, t in items if isinstance(t, Tensor)}

    def read(self, key: str) -> Tensor | None:
        """Return a tensor of one dimension or none; None where there is none, or a pickled one."""
        if key in self._state:
            return self._state[key]
        entry = self._config.get(key)
        if entry is None or entry["use_pickle"]:
            return None
        meta = entry["tensor_meta"]
        dtype = _DTYPES.get(meta["dtype"])
        sizes = [size["as_int"] for size in meta["sizes"]]
        if dtype is None or len(sizes) > 1 or any(s["as_int"] != 1 for s in meta["strides"]):
            return None
        offset, length = meta["storage_offset"]["as_int"], math.prod(sizes)
        with self._archive.open(self._names[f"data/weights/{entry['path_name']}"]) as file:
            data = file.read((offset + length) * dtype.itemsize)
        values = torch.frombuffer(bytearray(data), dtype=dtype, count=offset + length)
        return values[offset:].reshape(sizes)
