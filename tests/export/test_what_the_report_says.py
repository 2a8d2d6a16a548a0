"""What the report says of a file that is right and may still not be what is wanted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import stillnorm as sn
from export.nets import Net, exported, images, net, net_with
from stillnorm.errors import FileFormatError
from support.fingerprint import Fingerprint


def lost() -> nn.Module:
    """Trained, and without its statistics."""
    model = net()
    model.bn.reset_running_stats()
    return model


def stale() -> nn.Module:
    """After three updates, which leave 0.9³ of the initial values."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)).train()
    for seed in range(3):
        model(0.1 * images(8, seed))
    return model


def frozen() -> nn.Module:
    model = Net().train()
    model.bn.eval()
    return model


@pytest.mark.parametrize(
    ("make", "code", "paths"),
    [
        (lost, "SN101", ("bn",)),
        (stale, "SN115", ("1",)),
        (frozen, "SN004", ("bn",)),
    ],
)
def test_statistics_that_are_not_those_of_the_data(
    tmp_path: Path, make: Any, code: str, paths: tuple[str, ...]
) -> None:
    """They are exported as they are, and named."""
    model = make()
    before = Fingerprint(model)
    report = exported(model, images(), tmp_path, ".pt2", dynamic=False)
    assert Fingerprint(model).differences(before) == []
    assert [(one.code, one.paths) for one in report.findings] == [(code, paths)]
    said = " ".join(str(report).split())
    assert f"{code} {report.findings[0].slug}: " in said
    assert f": {', '.join(paths)} help: " in said
    assert "sn.recalibrate(model, batches)" in said
    assert json.loads(report.to_json())["findings"][0]["paths"] == list(paths)


def test_layers_that_are_not_in_the_file_are_not_named(tmp_path: Path) -> None:
    model = net()
    model.auxiliary = nn.BatchNorm2d(4)
    nn.init.uniform_(model.auxiliary.bias)
    assert [one.code for one in sn.check(model).findings] == ["SN101"]
    report = exported(model, images(), tmp_path, ".pt2", dynamic=False)
    assert report.findings == ()
    assert "SN" not in str(report)


def test_an_output_that_is_one_number_throughout(tmp_path: Path) -> None:
    """A final ReLU after a bias of -100: zeros, which a wrong file returns too."""
    model = net_with(lambda self, x: {"y": self.head(x), "z": (self.head(x) - 100).relu()})
    report = exported(model, images(), tmp_path, ".pt2")
    assert report.constant == ("z",)
    assert "z is one number throughout, in all samples" in str(report)
    assert json.loads(report.to_json())["runs"][0]["constant"] == ["z"]


def test_samples_that_are_alike_are_no_constant(tmp_path: Path) -> None:
    report = exported(net(), torch.ones(2, 3, 8, 8), tmp_path, ".pt2")
    assert report.constant == ()
    assert "throughout" not in str(report)


def test_other_sizes_that_are_open_were_not_tried(tmp_path: Path) -> None:
    sizes = ({0: Dim("n"), 2: Dim("h", min=4, max=32)},)
    report = exported(net(), images(), tmp_path, ".onnx", dynamic=sizes)
    assert report.untried == ("h",)
    assert "open, and not tried at other values: h" in str(report)
    assert exported(net(), images(), tmp_path, ".pt2").untried == ()


def test_each_writer_names_the_other(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError) as caught:
        sn.export_onnx(net(), images(), tmp_path / "net.pt2")
    assert "sn.export.export_program writes .pt2" in caught.value.help
    with pytest.raises(FileFormatError) as caught:
        sn.export.export_program(net(), images(), tmp_path / "net.onnx")
    assert "sn.export_onnx writes .onnx" in caught.value.help
    for verb in (sn.export.export_onnx, sn.export.export_program):
        assert f"{verb.__name__}(model, example, path)" in (sn.export.__doc__ or "")
