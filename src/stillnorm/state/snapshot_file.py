"""A snapshot as a file: tensors in safetensors, the rest as JSON in its metadata.

    {"version": 1, "layers": [{"paths": [...], "tensors": [...], "switches": {...}, "hold": {...}}]}

Files come from anywhere: what is read is checked to be data of that form.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stillnorm.errors import FileFormatError
from stillnorm.norms import Hold
from stillnorm.state.files import StrPath, read_tensors, write_tensors
from stillnorm.state.record import TENSORS, Recorded, dotted

_VERSION = 1
_KEY = "stillnorm.snapshot"

_SWITCHES: dict[str, tuple[type, ...]] = {
    "kind": (str,),
    "training": (bool,),
    "momentum": (float, int, type(None)),
    "eps": (float, int),
    "track_running_stats": (bool,),
    "held": (str, type(None)),
}


def write_snapshot(path: StrPath, layers: tuple[Recorded, ...]) -> None:
    """Write recorded layers."""
    content = {"version": _VERSION, "layers": [_to_json(layer) for layer in layers]}
    tensors = {
        dotted(layer.path, name): tensor
        for layer in layers
        for name, tensor in layer.tensors.items()
    }
    write_tensors(path, tensors, {"format": "pt", _KEY: json.dumps(content)})


def read_snapshot(path: StrPath) -> tuple[Recorded, ...]:
    """Read recorded layers.

    Raises:
        FileFormatError: It is no such file.
    """
    tensors, metadata = read_tensors(path)
    if _KEY not in metadata:
        raise FileFormatError(
            f"{path} is no snapshot", help="sn.snapshot(model).save(path) writes one"
        )
    try:
        content = json.loads(metadata[_KEY])
        version = content["version"]
        if version == _VERSION:
            return tuple(_from_json(layer, tensors) for layer in content["layers"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"{path} is a damaged snapshot ({type(error).__name__}: {error})",
            help="take and save it again",
        ) from error
    raise FileFormatError(
        f"{path} is a snapshot of version {version!r}; this stillnorm reads {_VERSION}",
        help="update stillnorm",
    )


def _to_json(layer: Recorded) -> dict[str, object]:
    return {
        "paths": layer.paths,
        "tensors": list(layer.tensors),
        "switches": layer.switches,
        "hold": None if layer.hold is None else dataclasses.asdict(layer.hold),
    }


def _from_json(layer: Any, tensors: Mapping[str, Tensor]) -> Recorded:
    paths, names, switches, hold = (layer[n] for n in ("paths", "tensors", "switches", "hold"))
    _check(paths and all(isinstance(path, str) for path in paths), "paths")
    _check(all(name in TENSORS for name in names), "tensors")
    expected = _SWITCHES | {
        f"{name}.requires_grad": (bool,) for name in ("weight", "bias") if name in names
    }
    if "trainable" in switches:  # of a layer of Keras
        expected["trainable"] = (bool,)
    _check(switches.keys() == expected.keys(), "switches")
    for switch, kinds in expected.items():
        _check(type(switches[switch]) in kinds, switch)
    return Recorded(
        tuple(paths),
        {name: tensors[dotted(paths[0], name)] for name in names},
        switches,
        None if hold is None else _hold(hold),
    )


def _hold(hold: Any) -> Hold:
    _check(hold["affine"] in ("frozen", "trains"), "hold")
    _check(type(hold["asked"]) is bool, "hold")
    _check(all(type(required) is bool for required in hold["required_grad"].values()), "hold")
    _check(isinstance(hold["shadowed_module"], str | None), "hold")
    return Hold(**hold)


def _check(holds: object, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} is not what it should be")
