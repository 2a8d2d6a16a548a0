"""SN205: the variance shift of dropout, and where it is not felt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diagnosis.nets import batches, conv_net, data, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis import Finding
from support.fingerprint import Fingerprint
from support.zoo import images, make, torchvision


def findings(net: nn.Module, inputs: object = None, **how: object) -> list[Finding]:
    report = check(net, batches(64, 64) if inputs is None else inputs, select="SN205", **how)
    assert not report.crashed, report.crashed
    assert not report.not_run, report.not_run
    return list(report.findings)


def dropped(p: float = 0.5, kind: Callable[[float], nn.Module] = nn.Dropout) -> nn.Sequential:
    """`conv_net` with a dropout before its second convolution: the norms are at "1" and "5"."""
    torch.manual_seed(0)
    layers = list(conv_net())
    return nn.Sequential(*layers[:3], kind(p), *layers[3:])


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_the_norm_after_a_dropout_is_found(kind: Callable[[float], nn.Module]) -> None:
    (finding,) = findings(dropped(kind=kind))
    assert (finding.severity, finding.paths) == ("warning", ("5",))
    assert finding.note == "dropout: 3 (p=0.5)"


def test_the_ratio_is_that_of_the_variances_in_train_and_eval_mode() -> None:
    """Known exactly: E x² / (1 - p) - m² over E x² - m², with m = 0 and independent inputs."""
    torch.manual_seed(0)
    x = torch.randn(4096, 64)
    (finding,) = findings(nn.Sequential(nn.Dropout(0.4), nn.Linear(64, 32), nn.BatchNorm1d(32)), x)
    assert finding.evidence["ratio"]["2"] == pytest.approx(1 / 0.6, rel=0.03)


class Functions(nn.Module):
    """Dropouts as functions, one of them in a branch that is added."""

    def __init__(self, residual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.bn, self.residual = nn.Linear(32, 32), nn.BatchNorm1d(32), residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(F.dropout(x, 0.5, self.training))
        return self.bn(x + y if self.residual else y).relu()


@pytest.mark.parametrize("residual", [True, False])
def test_functions_are_seen_and_named_by_the_module_that_calls_them(residual: bool) -> None:
    net = nn.Sequential(nn.Identity(), Functions(residual))
    with torch.no_grad():
        net[1].fc.weight *= 3
    (finding,) = findings(net, torch.randn(256, 32))
    assert finding.paths == ("1.bn",)
    assert finding.note == "dropout: 1 (p=0.5)"
    assert finding.where[0].startswith("test_dropout_before_norm.py:")


def test_only_norms_that_follow_directly_are_named() -> None:
    layers = [nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU()]
    net = nn.Sequential(nn.Dropout(0.5), *layers, nn.Linear(16, 16), nn.BatchNorm1d(16))
    assert [f.paths for f in findings(net, torch.randn(512, 16))] == [("2",)]


def test_it_explains_the_mismatch_that_it_causes() -> None:
    net = dropped(0.7)
    estimated(net)
    report = check(net, batches(64, 16), select="SN205,SN105")
    assert [(f.code, f.paths) for f in report.findings] == [("SN205", ("5",))]
    assert report.findings[0].explains == "SN105 on 5 (not repeated)"


def test_the_same_every_time_and_nothing_changes() -> None:
    net = dropped().train()
    x = data()
    torch.manual_seed(3)
    before = Fingerprint(net)
    (first,), (second,) = findings(net, x), findings(net, x)
    assert first.evidence == second.evidence
    assert Fingerprint(net) == before


def test_several_inputs_through_forward() -> None:
    (finding,) = findings(
        dropped(), [{"x": data(), "y": 1}], forward=lambda net, batch: net(batch["x"])
    )
    assert finding.paths == ("5",)


def test_an_injected_dropout_in_a_real_model() -> None:
    net = make("torchvision/resnet18")
    x = images(8, size=32)
    assert findings(net, x) == []
    net.layer1[0].conv1 = nn.Sequential(nn.Dropout(0.6), net.layer1[0].conv1)
    assert [f.paths for f in findings(net, x)] == [("layer1.0.bn1",)]


def test_deeplabs_head_has_one() -> None:
    """A find, not a false alarm: ASPP ends in a dropout, and a convolution and a norm follow."""
    torch.manual_seed(0)
    net = nn.Sequential(torchvision.models.segmentation.deeplabv3.DeepLabHead(8, 3, [1, 2, 3]))
    (finding,) = findings(net, torch.randn(4, 8, 8, 8))
    assert finding.paths == ("0.2",)
    assert finding.note == "dropout: 0.0.project.3 (p=0.5)"


class TestNearMisses:
    def test_after_the_last_norm(self) -> None:
        net = conv_net()
        assert findings(nn.Sequential(*net[:8], nn.Dropout(0.5), net[8])) == []

    def test_a_small_probability(self) -> None:
        assert findings(dropped(0.05)) == []

    @pytest.mark.parametrize("p", [0.0, 1.0])
    def test_a_probability_that_is_none(self, p: float) -> None:
        assert findings(dropped(p)) == []

    def test_a_wide_layer_whose_inputs_move_together(self) -> None:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Dropout(0.2), nn.Linear(512, 8, bias=False), nn.BatchNorm1d(8))
        with torch.no_grad():
            net[1].weight.fill_(1)
        x = torch.randn(256, 1) + 0.1 * torch.randn(256, 512)
        assert findings(net, x) == []

    def test_another_norm_between(self) -> None:
        net = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 16), nn.LayerNorm(16))
        assert findings(nn.Sequential(net, nn.BatchNorm1d(16)), torch.randn(64, 16)) == []

    def test_on_in_both_modes(self) -> None:
        class Always(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return F.dropout(x, 0.5)

        assert findings(dropped(kind=lambda p: Always())) == []

    def test_a_frozen_norm(self) -> None:
        net = estimated(dropped())
        freeze(net)
        assert findings(net) == []

    def test_instance_norm(self) -> None:
        net = dropped()
        net[5] = nn.InstanceNorm2d(8, track_running_stats=True)
        assert findings(net) == []

    def test_a_dropout_kept_off_by_train(self) -> None:
        class Off(nn.Sequential):
            def train(self, mode: bool = True) -> Off:
                super().train(mode)
                self[3].eval()
                return self

        assert findings(Off(*dropped())) == []

    def test_values_that_are_no_numbers(self) -> None:
        net = dropped()
        assert findings(net, data().fill_(torch.nan)) == []

    def test_one_value_per_channel(self) -> None:
        net = nn.Sequential(nn.Dropout(0.5), nn.Linear(16, 16), nn.BatchNorm1d(16))
        assert findings(net, torch.randn(1, 16)) == []
