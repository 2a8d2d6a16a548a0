"""What torch's exporters do to models and files, one by one, and that ours does not.

Each test first shows the failure with torch alone: when torch no longer has it, the test says so.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.onnx import TrainingMode

import stillnorm as sn
from export.nets import exported, images, net
from export.test_held_folded_split import run
from stillnorm.errors import ExportError, StateError
from support.fingerprint import Fingerprint, values

BOTH = pytest.mark.parametrize("suffix", [".onnx", ".pt2"])


def frozen_by_hand() -> nn.Module:
    """The model of thread 004: in train mode, one layer in eval."""
    model = net()
    model.bn.eval()
    return model


def legacy(model: nn.Module, path: Path, training: TrainingMode) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images(),), str(path), dynamo=False, training=training)


def eval_output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("training", [TrainingMode.EVAL, TrainingMode.TRAINING])
def test_the_legacy_exporter_thaws_what_was_frozen(tmp_path: Path, training: TrainingMode) -> None:
    """It remembers one mode and sets all modules to it (pytorch#52867, thread 004)."""
    model = frozen_by_hand()
    legacy(model, tmp_path / "legacy.onnx", training)
    assert model.bn.training  # thawed
    model = frozen_by_hand()
    before = Fingerprint(model)
    exported(model, images(), tmp_path, ".onnx")
    assert Fingerprint(model).differences(before) == []
    assert not model.bn.training


@pytest.mark.parametrize("training", [TrainingMode.PRESERVE, TrainingMode.TRAINING])
def test_the_legacy_exporter_moves_statistics(tmp_path: Path, training: TrainingMode) -> None:
    model = net()
    before = values(model)
    legacy(model, tmp_path / "legacy.onnx", training)
    assert values(model) != before
    model = net()
    exported(model, images(), tmp_path, ".onnx")
    assert values(model) == before


def test_the_legacy_exporter_writes_norms_in_training_mode(tmp_path: Path) -> None:
    """Also those that are in eval (pytorch#49229)."""
    legacy(frozen_by_hand(), tmp_path / "legacy.onnx", TrainingMode.TRAINING)
    (finding,) = sn.check(tmp_path / "legacy.onnx", select="SN701").findings
    assert len(finding.paths) == 2
    report = exported(frozen_by_hand(), images(), tmp_path, ".onnx")  # finds nothing by SN701
    assert report.max_error < 1e-5


@BOTH
def test_a_traced_train_mode_model_stays_in_train_mode(tmp_path: Path, suffix: str) -> None:
    """`jit.trace` bakes the batch statistics in; `.eval()` changes nothing (pytorch#29177)."""
    model = net()
    model.drop = nn.Identity()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, images(), check_trace=False).eval()
    mean = traced.bn.running_mean.clone()
    x = images(6, 9)
    assert float((traced(x) - eval_output(model, x)).detach().abs().max()) > 0.01
    assert not torch.equal(traced.bn.running_mean, mean)  # and goes on updating
    with pytest.raises(StateError, match="TorchScript"):
        exported(traced, images(), tmp_path, suffix)
    model = net()
    report = exported(model, images(), tmp_path, suffix)
    torch.testing.assert_close(run(report.path, x), eval_output(model, x), rtol=1e-4, atol=1e-5)


def test_a_program_of_a_train_mode_model_trains(tmp_path: Path) -> None:
    """`torch.export` keeps the training argument; nothing can change it afterwards."""
    model = net()
    model.drop = nn.Identity()
    theirs = torch.export.export(model, (images(),)).module()
    mean = theirs.bn.running_mean.clone()
    x = images()
    assert float((theirs(x) - eval_output(model, x)).detach().abs().max()) > 0.01
    assert not torch.equal(theirs.bn.running_mean, mean)
    with pytest.raises(NotImplementedError):
        theirs.eval()

    report = exported(net(), x, tmp_path, ".pt2")
    program = torch.export.load(report.path)
    ours = program.module()
    buffers = {name: b.clone() for name, b in ours.named_buffers()}
    torch.testing.assert_close(ours(x), eval_output(net(), x))
    assert all(torch.equal(b, buffers[name]) for name, b in ours.named_buffers())
    asked = [_training(node) for node in program.graph.nodes if "batch_norm" in str(node.target)]
    assert asked == [False, False]


def _training(node: Any) -> bool:
    names = [argument.name for argument in node.target._schema.arguments]
    return bool(node.args[names.index("training")])


def test_dropout_stays_in_the_graph_of_a_train_mode_model(tmp_path: Path) -> None:
    """The default exporter writes norms as in eval, and dropout as in training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net(), (images(),), tmp_path / "theirs.onnx", dynamo=True, verbose=False)
    assert "Dropout" in operators(tmp_path / "theirs.onnx")
    report = exported(net(), images(), tmp_path, ".onnx")
    assert "Dropout" not in operators(report.path)


def without_statistics() -> nn.Module:
    model = net()
    model.bn = nn.BatchNorm2d(4, track_running_stats=False)
    return model.eval()


def test_a_norm_without_statistics_makes_predictions_depend_on_the_batch(tmp_path: Path) -> None:
    """Both exporters write it without a word (pytorch#75252)."""
    model = without_statistics()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (images(),), tmp_path / "theirs.onnx", dynamo=True, verbose=False,
            dynamic_shapes=({0: "batch"},),
        )  # fmt: skip
    x = images(4, 9)
    alone, together = run(tmp_path / "theirs.onnx", x[:1]), run(tmp_path / "theirs.onnx", x)[:1]
    assert float((alone - together).abs().max()) > 0.01
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    alone, together = program.module()(x[:2]), program.module()(x)[:2]
    assert float((alone - together).detach().abs().max()) > 0.01
    for suffix in (".onnx", ".pt2"):
        with pytest.raises(ExportError, match="SN107"):
            exported(model, images(), tmp_path, suffix)


def test_an_export_that_fails_in_the_middle(tmp_path: Path) -> None:
    """The modes are those from before, and no file is left over (pytorch#43661)."""

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = frozen_by_hand()

        def forward(self, x: Tensor) -> Tensor:
            if torch.compiler.is_compiling():
                raise ValueError("cannot be exported")
            return self.inner(x)

    model = Fails()
    before = Fingerprint(model)
    with pytest.raises(ExportError, match="cannot be exported"):
        exported(model, images(), tmp_path, ".onnx")
    assert Fingerprint(model).differences(before) == []
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_samples_do_not_depend_on_their_batch(tmp_path: Path, suffix: str) -> None:
    """What all of this is about: in the file, one sample alone is what it is among others."""
    report = exported(net(), images(), tmp_path, suffix)
    x = images(6, 9)
    together = run(report.path, x)
    for i in range(6):
        alone = run(report.path, x[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-6)
