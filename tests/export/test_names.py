"""Inputs and outputs are called after what the model takes and returns, in the file too."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from export.nets import exported
from support.zoo import transformers

DetrOutput = transformers.models.detr.modeling_detr.DetrObjectDetectionOutput


class Head(nn.Module):
    """Its graph has values called linear, linear_1 and relu, and weights called fc.weight."""

    def __init__(self, returns: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.last = nn.Linear(3, 4), nn.Linear(4, 5)
        self.returns = returns

    def forward(self, x: Tensor, *more: Tensor, **named: Tensor) -> Any:
        h = self.fc(sum((*more, *named.values()), x)).relu()
        return self.returns(self.last(h), h, x)


class Key(str, Enum):  # noqa: UP042 - str() of a StrEnum is its text anyway
    LOGITS = "logits"


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def samples(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(seed))


def by_name(path: Path, given: dict[str, Tensor]) -> dict[str, Any]:
    """Run a file with plain onnxruntime."""
    runtime = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in runtime.get_outputs()]
    return dict(
        zip(names, runtime.run(None, {k: x.numpy() for k, x in given.items()}), strict=True)
    )


OUTPUTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "a tuple": (
        lambda y, h, x: (y, [h, None]),
        {"output.0": lambda y, h, x: y, "output.1.0": lambda y, h, x: h},
    ),
    "a named tuple": (
        lambda y, h, x: Pair(h, y),
        {"first": lambda y, h, x: h, "second": lambda y, h, x: y},
    ),
    "nested": (
        lambda y, h, x: {"logits": y, "aux": {"n": h.norm(dim=1), 0: h + 1}, "none": None},
        {
            "logits": lambda y, h, x: y,
            "aux.n": lambda y, h, x: h.norm(dim=1),
            "aux.0": lambda y, h, x: h + 1,
        },
    ),
    "names that the graph has": (
        lambda y, h, x: {"relu": y, "linear": h.sum(1), "last.bias": y + 1, "fc.weight": 2 * h},
        {
            "relu": lambda y, h, x: y,
            "linear": lambda y, h, x: h.sum(1),
            "last.bias": lambda y, h, x: y + 1,
            "fc.weight": lambda y, h, x: 2 * h,
        },
    ),
    "odd and doubled names": (
        lambda y, h, x: {
            "x": x,
            "a": {"b": y},
            "a.b": h,
            "a b/ö\n": y + 1,
            "": y + 2,
            3: y + 3,
            Key.LOGITS: y + 4,
        },
        {
            "x_1": lambda y, h, x: x,
            "a.b": lambda y, h, x: y,
            "a.b_1": lambda y, h, x: h,
            "a_b_ö_": lambda y, h, x: y + 1,
            "_": lambda y, h, x: y + 2,
            "output.3": lambda y, h, x: y + 3,
            "logits": lambda y, h, x: y + 4,
        },
    ),
    "a class of transformers": (
        lambda y, h, x: DetrOutput(logits=y, pred_boxes=h, auxiliary_outputs=[{"logits": y + 1}]),
        {
            "logits": lambda y, h, x: y,
            "pred_boxes": lambda y, h, x: h,
            "auxiliary_outputs.0.logits": lambda y, h, x: y + 1,
        },
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs(tmp_path: Path, name: str) -> None:
    """In onnxruntime each name gives its own numbers."""
    returns, expected = OUTPUTS[name]
    report = exported(Head(returns), samples(), tmp_path, ".onnx", dynamic=False)
    got = by_name(report.path, {"x": samples(1)})
    assert got.keys() == expected.keys()
    assert [port.name for port in report.outputs] == list(got)
    assert {error.name for error in report.runs[0].errors} == got.keys()
    of = Head(lambda *values: values)(samples(1))
    for key, function in expected.items():
        np.testing.assert_allclose(got[key], function(*of).detach(), rtol=1e-4, atol=1e-6)


def test_a_weight_among_the_outputs(tmp_path: Path) -> None:
    """A key that is another weight's name does not take its place."""
    model = Head(None)
    model.returns = lambda y, h, x: {"y": y, "fc.bias": model.fc.weight + 0, "w": model.fc.weight}
    report = exported(model, samples(), tmp_path, ".onnx", dynamic=False)
    got = by_name(report.path, {"x": samples(1)})
    assert [key.removesuffix("_1") for key in got] == ["y", "fc.bias", "w"]
    for value in list(got.values())[1:]:
        np.testing.assert_array_equal(value, model.fc.weight.detach())


x = samples()
INPUTS: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "positions": ((x, x, x), {}, ["x", "more.0", "more.1"]),
    "forward, a mapping": (
        {"pixel_values": x, "n": 3},
        {"forward": lambda m, e: m(e["pixel_values"])},
        ["pixel_values"],
    ),
    "forward, a tensor": (x, {"forward": lambda m, e: m(2 * e)}, ["input"]),
    "forward, a tuple": ((x, 3, [x]), {"forward": lambda m, e: m(e[0])}, ["input.0", "input.2.0"]),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(tmp_path: Path, name: str) -> None:
    example, options, names = INPUTS[name]
    report = exported(Head(lambda y, h, x: y), example, tmp_path, ".onnx", dynamic=False, **options)
    runtime = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    assert [value.name for value in runtime.get_inputs()] == names
    assert [port.name for port in report.inputs] == names


@dataclass
class Checked:
    """An output class of the user's, which looks at what it is given."""

    y: Tensor
    h: Tensor

    def __post_init__(self) -> None:
        if len(self.y) != len(self.h):
            raise ValueError("samples")


def test_a_dataclass(tmp_path: Path) -> None:
    torch.export.register_dataclass(Checked, serialized_type_name="Checked")
    model = Head(lambda y, h, x: Checked(y, h))
    for suffix in (".onnx", ".pt2"):
        report = exported(model, samples(), tmp_path, suffix, dynamic=False)
        assert [port.name for port in report.outputs] == ["y", "h"]


def test_a_program_keeps_the_structure_and_its_report_has_the_names(tmp_path: Path) -> None:
    returns, _ = OUTPUTS["nested"]
    report = exported(Head(returns), samples(), tmp_path, ".pt2")
    assert [str(port) for port in report.inputs] == ["x float32 (batch, 3)"]
    assert [port.name for port in report.outputs] == ["logits", "aux.n", "aux.0"]
    output = torch.export.load(report.path).module()(samples(1))
    assert output["aux"].keys() == {"n", 0}
