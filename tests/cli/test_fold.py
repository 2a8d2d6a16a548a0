"""`stillnorm fold` promises: what the library says, and a file that runs without it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

CODE = """
from collections import OrderedDict

import torch
from torch import nn


def net():
    torch.manual_seed(0)
    net = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), act=nn.ReLU()))
    net(torch.randn(8, 3, 9, 9))
    return net.eval()


def example():
    return torch.ones(2, 3, 9, 9)


def keywords():
    return {"input": torch.ones(2, 3, 9, 9)}


def call(model, example):
    return model(example[0])


def listed():
    return [example()]
"""


@pytest.fixture
def files(project):
    (project / "fold.py").write_text(CODE)
    return project


def test_it_tells_what_would_fold(run, files):
    result = run("fold", "fold.py:net", "--example", "fold.py:example")
    assert result.exit_code == 0
    assert result.stdout.startswith("1 norm folded, 0 not\n\noutput off by ")


def test_as_json(run, files):
    result = run("fold", "fold.py:net", "--example", "fold.py:example", "--format", "json")
    told = json.loads(result.stdout)
    assert (told["folded"], told["refused"]) == (["bn"], [])
    assert told["errors"]["bn"]["dtype"] == "float32"


@pytest.mark.parametrize("example", ["example", "keywords"])
def test_a_program_that_runs_where_stillnorm_is_not(run, files, example):
    result = run("fold", "fold.py:net", "--example", f"fold.py:{example}", "--out", "net.pt2")
    assert result.exit_code == 0, result.output
    torch.save(_expected(), files / "y.pt")
    call = "input=x" if example == "keywords" else "x"
    code = (
        "import sys, torch; sys.modules['stillnorm'] = None\n"
        "model = torch.export.load('net.pt2').module()\n"
        "x = torch.ones(2, 3, 9, 9)\n"
        f"torch.testing.assert_close(model({call}), torch.load('y.pt'))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=files, check=True)


def _scope():
    scope = {}
    exec(CODE, scope)
    return scope


def _expected():
    scope = _scope()
    return scope["net"]()(scope["example"]()).detach()


def test_the_tensors_alone(run, files):
    assert run(
        "fold", "fold.py:net", "--example", "fold.py:example", "--out", "net.safetensors"
    ).exit_code == 0  # fmt: skip
    assert sorted(load_file(files / "net.safetensors")) == ["conv.bias", "conv.weight"]


def test_forward(run, files):
    args = ("fold", "fold.py:net", "--example", "fold.py:listed", "--forward", "fold.py:call")
    result = run(*args, "--out", "net.pt2")
    assert result.exit_code == 0, result.output
    program = torch.export.load(files / "net.pt2").module()
    torch.testing.assert_close(program(_scope()["listed"]()), _expected())


def test_the_first_batch_of_the_data_and_every_batch_size(run, files):
    result = run("fold", "fold.py:net", "--data", "fold.py:listed", "--out", "net.pt2")
    assert result.exit_code == 0, result.output
    assert torch.export.load(files / "net.pt2").module()(torch.ones(5, 3, 9, 9)).shape[0] == 5


def test_a_program_that_computes_something_else_is_not_written(run, files, monkeypatch):
    from stillnorm.export import program

    monkeypatch.setattr(program, "numbers", lambda tree: [tree + 1])
    result = run("fold", "fold.py:net", "--example", "fold.py:example", "--out", "net.pt2")
    assert result.exit_code == 2
    assert "of its largest value" in result.stderr
    assert not list(files.glob("*net.pt2*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [((), "give an input"), (("--example", "a:b", "--out", "none/n.pt2"), "there is no folder")],
)
def test_what_cannot_be_meant(run, files, options, said):
    result = run("fold", "fold.py:net", *options)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())


def test_an_ending_that_says_nothing(run, files):
    result = run("fold", "fold.py:net", "--example", "fold.py:example", "--out", "net.pt")
    assert result.exit_code == 2
    assert ".pt2" in result.stderr
    assert not (files / "net.pt").exists()
