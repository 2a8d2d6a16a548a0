"""ONNX graphs written by hand: what an exporter could write, and what none of them does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STATISTICS = {"weight": 1.5, "bias": 0.5, "running_mean": 0.25, "running_var": 2.0}


def norm(name: str, x: str = "x", y: str = "y", *, outputs: int = 1, **attributes: Any) -> Any:
    """A BatchNormalization node whose tensors are called after the layer."""
    inputs = [x, *(f"{name}.{part}" for part in STATISTICS)]
    more = [f"{y}_{i}" for i in range(1, outputs)]
    return helper.make_node(
        "BatchNormalization", inputs, [y, *more], f"node_{name}", epsilon=1e-3, **attributes
    )


def tensors(name: str, dtype: type = np.float32) -> list[Any]:
    """Its initializers."""
    return [
        numpy_helper.from_array(np.full(3, value, dtype), f"{name}.{part}")
        for part, value in STATISTICS.items()
    ]


def graph(nodes: list[Any], initializers: list[Any], name: str = "g") -> Any:
    image = ["N", 3, 4, 4]
    return helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, image)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, image)],
        initializers,
    )


def save(path: Path, body: Any, opset: int = 20, functions: Any = ()) -> Path:
    versions = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    onnx.save(helper.make_model(body, opset_imports=versions, functions=list(functions)), path)
    return path
