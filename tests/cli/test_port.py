"""`stillnorm port`: weights of a Keras file into a torch model's, and the table of differences."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import pytest
import torch
from keras import layers
from safetensors import safe_open
from safetensors.torch import load_file

from porting.twins import dense_net

CODE = """
import torch
from torch import nn

def make():
    return nn.Sequential(
        nn.Linear(6, 10), nn.ReLU(), nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 3, False)
    )

def other():
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.BatchNorm1d(10), nn.Linear(10, 3, False))

def x():
    torch.manual_seed(1)
    return torch.randn(16, 6)
"""


@pytest.fixture
def model(project: Path) -> Any:
    (project / "twin.py").write_text(CODE)
    model = dense_net()
    model.save(project / "model.keras")
    return model


def test_the_weights_are_written(run: Any, project: Path, model: Any) -> None:
    arguments = ("port", "from-keras", "model.keras", "twin.py:make")
    result = run(*arguments, "--example", "twin.py:x", "--out", "twin.safetensors")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("3 layers ported to torch, 1 of them batch norms")
    assert "the tensors of the model with these weights: twin.safetensors" in result.stderr
    state = load_file(project / "twin.safetensors")
    assert torch.equal(state["4.weight"].T, model.layers[-1].kernel.value.detach())

    result = run(*arguments, "--format", "json", "--count", "64")
    told = json.loads(result.stdout)
    assert (told["to"], len(told["ported"])) == ("torch", 3)
    assert "n / (n - 1)" in told["variance"]
    assert "nothing is written" in result.stderr


def test_a_map_of_names(run: Any, project: Path, model: Any) -> None:
    norm = next(x.name for x in model.layers if isinstance(x, layers.BatchNormalization))
    (project / "names.json").write_text(json.dumps({norm: "2"}))
    arguments = ("port", "from-keras", "model.keras", "twin.py:make", "--names", "names.json")
    result = run(*arguments)
    assert result.stdout.startswith("1 layer ported to torch, 1 of them batch norms, matched by n")
    (project / "names.json").write_text("[1]")
    result = run(*arguments)
    assert result.exit_code == 2
    assert "names.json is no map of names to paths" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("model.keras", "twin.py:other", "--example", "twin.py:x"), "the models differ"),
        (("none.keras", "twin.py:make"), "none.keras"),
        (("twin.py", "twin.py:make"), "twin.py is no .keras file"),
        (("model.keras", "twin.py:make", "--out", "twin.pt"), "written as .safetensors only"),
        (("code.keras", "twin.py:make"), "code.keras cannot be loaded: Requested"),
        (("broken.keras", "twin.py:make"), "broken.keras cannot be loaded"),
    ],
)
def test_what_fails_is_said_and_nothing_written(
    run: Any, project: Path, model: Any, arguments: tuple[str, ...], said: str
) -> None:
    code = keras.Sequential([keras.Input((6,)), layers.Lambda(lambda x: x)])
    code.save(project / "code.keras")
    (project / "broken.keras").write_bytes((project / "model.keras").read_bytes()[:500])
    before = {path.name for path in project.iterdir()}
    result = run("port", "from-keras", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert {path.name for path in project.iterdir()} - before <= {"__pycache__"}


def test_the_table(run: Any) -> None:
    text = run("port", "table").stdout
    assert "UPDATE_OPS" in text
    assert "SN101" in text
    assert json.loads(run("port", "table", "--format", "json").stdout)["differences"]
    assert "<h1>What batch norm and dropout are" in run("port", "table", "--format", "html").stdout


def test_the_table_needs_no_keras_and_help_no_torch() -> None:
    code = """
import sys
from stillnorm.cli.main import main
main(sys.argv[1:], standalone_mode=False)
print(*sorted({"keras", "torch", "jax"} & set(sys.modules)), file=sys.stderr)
"""
    for arguments, loaded in ((("port", "--help"), ""), (("port", "table"), "torch")):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": ""},
        )
        assert done.stderr.split()[-1:] == loaded.split(), done.stderr


def test_what_is_in_no_tensor_is_said_beside_the_file(run: Any, project: Path, model: Any) -> None:
    (project / "same.py").write_text(CODE.replace("BatchNorm1d(10)", "BatchNorm1d(10, 1e-3, 0.01)"))
    arguments = ("--example", "twin.py:x", "--out", "twin.safetensors")
    result = run("port", "from-keras", "model.keras", "twin.py:make", *arguments)
    assert result.exit_code == 0
    assert "BatchNorm1d(..., eps=0.001, momentum=0.01)" in result.stderr
    assert "twin.safetensors loaded into twin.py:make is another model" in result.stderr
    with safe_open(project / "twin.safetensors", "pt") as file:
        kept = json.loads(file.metadata()["stillnorm.port"])
    assert kept == {"2": {"eps": 0.001, "momentum": 0.01}}
    result = run("port", "from-keras", "model.keras", "same.py:make", *arguments)
    assert "another model" not in result.stderr
    with safe_open(project / "twin.safetensors", "pt") as file:
        assert not file.metadata()
