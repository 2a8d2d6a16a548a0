"""`stillnorm inspect` promises: what the library says, in text or JSON, on the device asked for."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import stillnorm as sn


def test_inspect_prints_what_the_library_says(run):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert run("inspect", "net.py:healthy").stdout.rstrip("\n") == str(sn.inspect(net))


def test_inspect_as_json(run):
    (layer,) = json.loads(run("inspect", "net.py:make", "--format", "json").stdout)["layers"]
    assert (layer["path"], layer["normalizes_by_in_train"], layer["used"]) == ("bn", "batch", None)


def test_inspect_with_data_shows_what_was_used(run):
    result = run("inspect", "net.py:make", "--data", "net.py:val", "--format", "json")
    assert json.loads(result.stdout)["layers"][0]["used"] == ["batch", "batch"]


def test_inspect_all_shows_every_layer(run, project):
    (project / "many.py").write_text(
        "from torch import nn\nnet = nn.Sequential(*(nn.BatchNorm1d(2) for _ in range(30)))\n"
    )
    assert "30 norm layers in 1 rows" not in run("inspect", "many.py:net", "--all").stdout
    assert "\n29  " in run("inspect", "many.py:net", "--all").stdout
    assert "\n29  " not in run("inspect", "many.py:net").stdout


def test_forward_calls_the_model(run, fails):
    args = ("inspect", "net.py:healthy", "--data", "net.py:dicts")
    _, help = fails(*args)
    assert "--forward net.py:function" in help
    assert run(*args, "--forward", "net.py:of_dicts").exit_code == 0


@pytest.mark.parametrize("device", ["cuda:99", "nonsense"])
def test_a_device_that_is_not_there_is_bad_usage(run, device):
    result = run("inspect", "net.py:make", "--device", device)
    assert result.exit_code == 2
    assert "--device" in result.stderr
