"""Models that stillnorm has changed are exported as what they compute."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import stillnorm as sn
from export.nets import TwoViews, exported, images, net, settle
from support.fingerprint import Fingerprint

BOTH = pytest.mark.parametrize("suffix", [".onnx", ".pt2"])


def run(path: Path, x: Tensor) -> Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    runtime = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(runtime.run(None, {runtime.get_inputs()[0].name: x.numpy()})[0])


def agrees(model: nn.Module, plain: nn.Module, tmp_path: Path, suffix: str) -> sn.ExportReport:  # type: ignore[name-defined]
    before = Fingerprint(model)
    report = exported(model, images(), tmp_path, suffix)
    assert Fingerprint(model).differences(before) == []
    x = images(5, 8)
    with torch.no_grad():
        torch.testing.assert_close(run(report.path, x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    return report


@BOTH
@pytest.mark.parametrize("affine", ["frozen", "trains"])
def test_held(tmp_path: Path, suffix: str, affine: str) -> None:
    """A held norm is a batch norm in the file, or folded like any other."""
    model = net()
    sn.freeze(model, affine=affine)  # type: ignore[arg-type]
    report = agrees(model, net(), tmp_path, suffix)
    assert report.remaining == (("late",) if suffix == ".onnx" else ("bn", "late"))
    assert sn.is_frozen(model)
    assert model.training


@BOTH
def test_held_and_computed_in_the_convolution(tmp_path: Path, suffix: str) -> None:
    model = net()
    assert sn.freeze(model, fold_on=images(), fold_when="always").folded == ("bn",)
    agrees(model, net(), tmp_path, suffix)
    assert sn.is_frozen(model)


@BOTH
def test_folded(tmp_path: Path, suffix: str) -> None:
    folded = sn.fold(net(), images())
    assert folded.folded == ("bn",)
    report = agrees(folded.model, net(), tmp_path, suffix)
    assert (report.remaining, report.absorbed) == (("late",), ())


@BOTH
def test_split_norms_are_exported_call_by_call(tmp_path: Path, suffix: str) -> None:
    """Each call has its own statistics in the file; the counter begins anew in each forward."""
    torch.manual_seed(0)
    model = settle(TwoViews())
    shared = exported(model, images(), tmp_path, suffix)
    assert shared.remaining == (("bn",) if suffix == ".pt2" else shared.remaining)
    before = run(shared.path, images(5, 8))
    split = sn.split_shared(model, [images(64, seed) for seed in range(4)])
    assert [one.path for one in split.split] == ["bn"]
    report = exported(model, images(), tmp_path, suffix)
    sites = {*report.remaining, *report.absorbed}
    assert sites == {"bn.sites.0", "bn.sites.1"}
    x = images(5, 8)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(run(report.path, x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert float((run(report.path, x) - before).abs().max()) > 0.1
    stored = sn.check(report.path, select="SN701")
    assert not stored.findings


def test_frozen_layers_of_others(tmp_path: Path) -> None:
    """They compute by hand: no batch norm is in the file, and the numbers are right."""
    from support.zoo import torchvision

    torch.manual_seed(0)
    frozen = torchvision.ops.FrozenBatchNorm2d(4)
    frozen.running_mean.uniform_(-0.3, 0.3)
    report = exported(nn.Sequential(nn.Conv2d(3, 4, 3), frozen), images(), tmp_path, ".pt2")
    assert (report.remaining, report.absorbed) == ((), ("1",))
    assert report.max_error == 0
