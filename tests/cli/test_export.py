"""`stillnorm export` promises: a file that computes what the model does, or one clear line."""

from __future__ import annotations

import json

import pytest
import torch

CODE = """
import torch
from torch import nn


def net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    net(torch.randn(8, 3, 9, 9))
    return net


def broken():
    model = net()
    model[1].running_var[0] = float("nan")
    return model


def by_value():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return nn.Sequential(net(), Branch())


def example():
    return torch.ones(2, 3, 9, 9)


def data():
    return [(torch.ones(4, 3, 9, 9), torch.zeros(4))]


def dicts():
    return [{"image": torch.ones(4, 3, 9, 9), "label": 3}]


def of_dicts(model, batch):
    return model(batch["image"])


def nothing():
    return []
"""


@pytest.fixture
def files(project):
    (project / "ex.py").write_text(CODE)
    return project


def test_an_onnx_graph(run, files):
    result = run("export", "ex.py:net", "--example", "ex.py:example", "--out", "net.onnx")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("net.onnx computes what the model does in eval mode")
    assert "ONNX graph, opset" in result.stdout
    assert run("check", "net.onnx", "--select", "SN701").exit_code == 0


def test_a_program_as_json(run, files):
    args = ("export", "ex.py:net", "--example", "ex.py:example", "--out", "net.pt2")
    told = json.loads(run(*args, "--format", "json").stdout)
    assert (told["format"], told["remaining"]) == ("exported program", ["1"])
    assert [one["batch_size"] for one in told["runs"]] == [2, 1, 3]
    assert torch.export.load("net.pt2").module()(torch.ones(7, 3, 9, 9)).shape[0] == 7
    assert run("check", "net.pt2", "--select", "SN701").exit_code == 0
    told = json.loads(run(*args, "--format", "json", "--fixed-batch").stdout)
    assert told["fixed_batch"] == "as asked"


def test_the_first_batch_of_the_data(run, files):
    args = ("export", "ex.py:net", "--format", "json", "--out", "net.pt2", "--data")
    told = json.loads(run(*args, "ex.py:data").stdout)
    assert told["runs"][0]["batch_size"] == 4
    told = json.loads(run(*args, "ex.py:dicts", "--forward", "ex.py:of_dicts").stdout)
    assert told["remaining"] == ["1"]


def test_a_finding_speaks_against_it(fails, files):
    fact, help = fails("export", "ex.py:broken", "--example", "ex.py:example", "--out", "net.onnx")
    assert fact.startswith("SN102 non-finite-statistics: ")
    assert fact.endswith("; layer 1")
    assert "recalibrate" in help
    assert not (files / "net.onnx").exists()


def test_a_branch_on_a_value(fails, files):
    fact, help = fails("export", "ex.py:by_value", "--example", "ex.py:example", "--out", "n.pt2")
    assert fact.startswith("torch.export failed: GuardOnDataDependentSymNode")
    assert fact.endswith("(ex.py:22)")
    assert "torch.where" in help


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--example", "ex.py:example", "--out", "net.pt"), ".onnx, an ONNX graph"),
        (("--example", "ex.py:example", "--out", "none/net.pt2"), "there is no folder none"),
        (("--out", "net.pt2"), "--example TARGET or --data TARGET"),
        (("--example", "a.py:b", "--data", "a.py:b", "--out", "net.pt2"), "give an input"),
        (("--data", "ex.py:nothing", "--out", "net.pt2"), "there is no batch in ex.py:nothing"),
        (("--example", "ex.py:dicts", "--out", "net.pt2"), "on the example, the forward raised"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(run, files, options, said):
    result = run("export", "ex.py:net", *options)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert not list(files.glob("*.pt*"))
