"""Models of which no right file can be made are refused, with the finding; near misses are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import stillnorm as sn
from export.nets import Net, exported, images, net, net_with, settle
from stillnorm.errors import ExportError
from support.fingerprint import Fingerprint

BOTH = pytest.mark.parametrize("suffix", [".onnx", ".pt2"])


def with_statistics(name: str, value: float) -> nn.Module:
    model = net()
    getattr(model.bn, name)[1] = value
    return model


def without_statistics() -> nn.Module:
    model = net()
    model.bn = nn.BatchNorm2d(4, track_running_stats=False)
    return model


class InAList(Net):
    """eval() does not reach its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = [nn.BatchNorm2d(4)]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norms[0](self.conv(x)).mean((2, 3)))


BAD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no statistics": (without_statistics, "SN107"),
    "NaN": (lambda: with_statistics("running_mean", float("nan")), "SN102"),
    "infinity": (lambda: with_statistics("running_var", float("inf")), "SN102"),
    "negative": (lambda: with_statistics("running_var", -0.5), "SN103"),
    "a function": (
        lambda: net_with(lambda self, x: F.batch_norm(self.head(x), None, None, training=True)),
        "SN007",
    ),
    "a list": (InAList, "SN007"),
}


@BOTH
@pytest.mark.parametrize("name", BAD)
def test_refused_with_the_finding(tmp_path: Path, name: str, suffix: str) -> None:
    make, code = BAD[name]
    model = make()
    before = Fingerprint(model)
    with pytest.raises(ExportError, match=code) as caught:
        exported(model, images(), tmp_path, suffix)
    (finding,) = caught.value.findings
    assert finding.code == code
    assert f"{finding.message}; layer {finding.paths[0] or '(root)'}" in caught.value.fact
    assert caught.value.help == finding.help != ""
    assert Fingerprint(model).differences(before) == []
    assert list(tmp_path.iterdir()) == []


@BOTH
def test_one_sample_does_not_hide_what_depends_on_the_batch(tmp_path: Path, suffix: str) -> None:
    """On maps one sample suffices for a batch norm to run; it is shown two."""
    model = net_with(
        lambda self, x: F.batch_norm(self.conv(x), None, None, training=True).mean((2, 3))
    )
    with pytest.raises(ExportError, match="SN007"):
        exported(model, images(1), tmp_path, suffix)


def test_what_the_rules_cannot_see_is_seen_in_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the rules blind, the graph still says it: SN701."""
    monkeypatch.setattr("stillnorm.export.writing.must_be_exportable", lambda *args: None)
    for suffix in (".pt2", ".onnx"):
        with pytest.raises(ExportError, match="SN701"):
            exported(without_statistics(), images(), tmp_path, suffix)
    assert list(tmp_path.iterdir()) == []


class Standardised(nn.Conv2d):
    """Weights normalised by batch norm, which has nothing of the batch (onnxscript#1338)."""

    def forward(self, x: Tensor) -> Tensor:
        w = F.batch_norm(self.weight.reshape(1, len(self.weight), -1), None, None, training=True)
        return F.conv2d(x, w.reshape_as(self.weight), self.bias)


def unreached() -> nn.Module:
    model = net()
    model.auxiliary = nn.BatchNorm2d(4, track_running_stats=False)
    model.broken = nn.BatchNorm2d(4)
    model.broken.running_mean.fill_(float("nan"))
    return model


class NoReturn(Net):
    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)


NEAR: dict[str, Callable[[], nn.Module]] = {
    "layers that the example does not reach": unreached,
    "instance norm without statistics": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)
    ),
    "group norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
    "initial statistics": Net,
    "standardised weights": lambda: Standardised(3, 4, 3),
    "a train() that returns nothing": lambda: settle(NoReturn()),
    "without norms": lambda: nn.Conv2d(3, 4, 3),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses(tmp_path: Path, name: str) -> None:
    report = exported(NEAR[name](), images(), tmp_path, ".pt2")
    assert [one.batch_size for one in report.runs] == [2, 1, 3]


def test_the_fix_of_the_finding_makes_it_exportable(tmp_path: Path) -> None:
    model = without_statistics()
    sn.track_statistics(model, [images(64, seed) for seed in range(4)])
    exported(model, images(), tmp_path, ".onnx")
    model = with_statistics("running_mean", float("nan"))
    sn.recalibrate(model, [images(64, seed) for seed in range(4)])
    assert torch.isfinite(model(images())).all()
    exported(model, images(), tmp_path, ".pt2")
