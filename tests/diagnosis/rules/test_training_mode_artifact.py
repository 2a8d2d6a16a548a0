"""SN701: a graph in training mode is found; every one that mixes nothing is silent.

What graphs are read as is tested in test_onnx_file.py and test_pt2_file.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from diagnosis.graphs import graph, norm, save, tensors
from diagnosis.nets import conv_net, estimated, found
from stillnorm import check
from stillnorm.diagnosis import Report
from support import zoo


def look(path: Path) -> Report:
    report = check(path, select="SN701")
    assert not report.crashed, report.crashed
    return report


def test_onnx_in_training_mode(tmp_path: Path) -> None:
    nodes = [norm("a", y="h"), norm("b", x="h", training_mode=1)]
    path = save(tmp_path / "net.onnx", graph(nodes, tensors("a") + tensors("b")))
    (finding,) = look(path).findings
    assert (finding.severity, finding.paths) == ("error", ("b",))
    assert finding.message == (
        "1 of 2 norm layers in the ONNX graph normalise by the batch: "
        "the output of a sample depends on the others"
    )
    assert finding.evidence == {"by_batch": 1, "of": 2, "no_statistics": 0}
    assert (finding.note, finding.fix) == ("", None)


def test_a_layer_without_statistics_needs_more_than_eval(tmp_path: Path) -> None:
    nodes = [norm("a", training_mode=1)]
    some = [t for t in tensors("a") if "running" not in t.name]
    (finding,) = look(save(tmp_path / "net.onnx", graph(nodes, some))).findings
    assert "without running statistics" in finding.note
    assert "track_statistics" in finding.help


@pytest.mark.parametrize("training", [False, True])
def test_a_real_model(tmp_path: Path, training: bool) -> None:
    torch.manual_seed(0)
    net = zoo.CLASSIFIERS["torchvision/resnet18"]().train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(net, (torch.ones(2, 3, 32, 32),))
        torch.export.save(program, tmp_path / "net.pt2")
    report = check(tmp_path / "net.pt2")
    assert len(report.layers) == 20
    errors = {f.code: len(f.paths) for f in report.findings if f.severity == "error"}
    assert errors == ({"SN701": 20} if training else {})


def test_a_healthy_graph_is_silent(tmp_path: Path) -> None:
    assert look(save(tmp_path / "a.onnx", graph([norm("bn")], tensors("bn")))).findings == ()


def test_a_state_dict_and_a_model_have_no_graph() -> None:
    net = estimated(conv_net())
    (missed,) = check(net.state_dict(), select="SN701").not_run
    assert missed.reason == "a state dict has no graph, as an .onnx or a .pt2 file has"
    (missed,) = check(net, select="SN701").not_run
    assert missed.reason == "needs a checkpoint file"
    assert found(check(nn.Identity(), select="SN701")) == {}
