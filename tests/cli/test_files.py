"""Files as targets: `check` and `inspect` read them, everything else asks for the model."""

from __future__ import annotations

import json

import pytest
import torch

from diagnosis.graphs import graph, norm, save, tensors
from diagnosis.nets import conv_net, estimated


@pytest.fixture
def checkpoint(project):
    net = estimated(conv_net())
    net[4].running_var[2] = torch.nan
    torch.save({"state_dict": net.state_dict()}, project / "run3.ckpt")
    return "run3.ckpt"


def test_check_finds_what_is_in_a_checkpoint(run, checkpoint):
    result = run("check", checkpoint)
    assert result.exit_code == 1
    assert result.stdout.startswith("run3.ckpt: checkpoint, 2 norm layers, ")
    assert "SN102" in result.stdout
    found = json.loads(run("check", checkpoint, "--format", "json").stdout)
    assert (found["model"], found["file"]) == ("run3.ckpt", "checkpoint")


def test_a_torn_checkpoint_is_an_error(run, project):
    state = conv_net().state_dict()
    del state["1.running_var"]
    torch.save(state, project / "torn.pt")
    assert "SN601" in run("check", "torn.pt").stdout


def test_check_reads_a_graph(run, project):
    save(project / "net.onnx", graph([norm("bn", training_mode=1)], tensors("bn")))
    assert "SN701" in run("check", "net.onnx").stdout
    assert "batch" in run("inspect", "net.onnx").stdout


def test_inspect_shows_a_checkpoint(run, checkpoint):
    assert run("inspect", checkpoint).stdout.startswith("run3.ckpt: checkpoint, 2 norm layers\n")
    rows = json.loads(run("inspect", checkpoint, "--format", "json").stdout)["layers"]
    assert [row["path"] for row in rows] == ["1", "4"]


@pytest.mark.parametrize(
    "options",
    [["--data", "net.py:val"], ["--weights", "run3.ckpt"], ["--device", "cpu"], ["--fix"]],
)
def test_what_goes_with_a_model_only(run, checkpoint, options):
    result = run("check", checkpoint, *options)
    assert result.exit_code == 2
    assert f"{options[0]} needs a model: run3.ckpt is a file" in result.stderr


def test_other_commands_need_the_model(fails, checkpoint, project):
    data = ("--data", "net.py:val")
    fact, help = fails("recalibrate", checkpoint, *data)
    assert fact == "run3.ckpt is a checkpoint, and this needs the model itself"
    assert help == "put it into its model: net.py:make --weights run3.ckpt"
    save(project / "net.onnx", graph([norm("bn")], tensors("bn")))
    assert "an exported graph" in fails("recalibrate", "net.onnx", *data)[0]
