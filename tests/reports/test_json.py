"""JSON promises: any result becomes data that every JSON reader accepts, without loss."""

from __future__ import annotations

import enum
import json as plain_json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stillnorm.reports import json


class Colour(enum.Enum):
    RED = "red"


@dataclass(frozen=True)
class Result:
    path: str
    values: tuple[float, ...]
    _private: object = object()


def strict(source: str) -> object:
    """Read JSON as the standard says: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> object:
        raise AssertionError(constant)

    return plain_json.loads(source, parse_constant=refuse)


@pytest.mark.parametrize(
    ("obj", "data"),
    [
        (Result("bn1", (1.0, 2.0)), {"path": "bn1", "values": [1.0, 2.0]}),
        (torch.tensor([[1.5, math.nan]]), [[1.5, "nan"]]),
        (torch.ones(2, dtype=torch.bfloat16, requires_grad=True), [1.0, 1.0]),
        (torch.tensor(3), 3),
        (torch.float16, "float16"),
        (torch.device("cpu"), "cpu"),
        (-math.inf, "-inf"),
        (Colour.RED, "red"),
        (Path("a") / "b.pt", str(Path("a") / "b.pt")),
        ({"b", "a"}, ["a", "b"]),
        ({1: None, "x": True}, {"1": None, "x": True}),
    ],
)
def test_what_becomes_of_what(obj, data):
    assert json.to_jsonable(obj) == data
    assert strict(json.dumps(obj)) == data


def test_what_is_not_data_is_refused():
    with pytest.raises(TypeError, match="Linear is not data"):
        json.dumps({"module": nn.Linear(1, 1)})


def test_keys_keep_their_order():
    assert list(strict(json.dumps({"b": 1, "a": Result("x", ())}))) == ["b", "a"]


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, width=64),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(values)
def test_data_comes_back_as_it_was(data):
    def expected(x):
        if isinstance(x, float) and math.isinf(x):
            return str(x)
        if isinstance(x, list):
            return [expected(y) for y in x]
        return {k: expected(v) for k, v in x.items()} if isinstance(x, dict) else x

    assert strict(json.dumps(data)) == expected(data)
