"""SN005: fires on a model that validation has left in eval, and not where eval is declared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from diagnosis import steps
from diagnosis.nets import conv_net, data, estimated
from stillnorm import check, eval_mode, freeze
from stillnorm.diagnosis import Report
from support.fingerprint import Fingerprint
from support.zoo import torchvision


def report_of(net: nn.Module, train_step: Any, x: Any = None, **given: Any) -> Report:
    x = data(16) if x is None else x
    report = check(net, x, train_step=train_step, select="SN005", **given)
    assert not report.crashed
    return report


def net_() -> nn.Sequential:
    return estimated(conv_net())


def test_a_model_left_in_eval() -> None:
    net = net_().eval()
    before = Fingerprint(net)
    (finding,) = report_of(net, steps.plain(steps.sgd(net))).findings
    assert finding.severity == "warning"
    assert finding.paths == ("1", "4")
    assert all(line.startswith("steps.py:") for line in finding.where)
    assert finding.note == ""
    assert Fingerprint(net).differences(before) == []


def test_the_counters_tell_for_how_long() -> None:
    net = net_().train()
    optimizer = torch.optim.Adam(net.parameters())
    step = steps.plain(optimizer)
    for layer in (net[1], net[4]):
        layer.num_batches_tracked.zero_()
    for _ in range(3):
        step(net, data(16))
    net.eval()  # and nobody undoes it
    for _ in range(4):
        step(net, data(16))
    (finding,) = report_of(net, step).findings
    assert finding.evidence == {"layers": 2, "optimizer steps": 7, "updates": 3}
    assert finding.note == "the optimizer has taken 7 steps, the statistics 3 updates"


def test_without_affine_parameters_what_is_around_trains() -> None:
    net = estimated(conv_net(affine=False)).eval()
    assert report_of(net, steps.plain(steps.sgd(net))).findings[0].paths == ("1", "4")
    net[:5].requires_grad_(False)
    assert not report_of(net, steps.plain(steps.sgd(net))).findings


def test_a_resnet_before_and_after_train() -> None:
    net = torchvision.models.resnet18(num_classes=4).eval()
    x = torch.randn(4, 3, 32, 32)
    step = steps.plain(steps.sgd(net))
    assert len(report_of(net, step, x).findings[0].paths) == 20
    assert not report_of(net.train(), step, x).findings


class NormEval(nn.Module):
    """mmdetection's `norm_eval`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net_()

    def train(self, mode: bool = True) -> NormEval:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class TestDeclared:
    def silent(self, net: nn.Module, step: Any = None, **given: Any) -> None:
        report = report_of(net, step or steps.plain(steps.sgd(net)), **given)
        assert not report.findings
        assert not report.not_run

    @pytest.mark.parametrize("train", [True, False])
    @pytest.mark.parametrize("affine", ["frozen", "trains"])
    def test_a_network_fine_tuned_while_held(self, train: bool, affine: Any) -> None:
        net = net_()
        freeze(net, affine=affine)
        self.silent(net.train(train))

    @pytest.mark.parametrize("train", [True, False])
    def test_norm_eval(self, train: bool) -> None:
        self.silent(NormEval().train(train))

    def test_norms_alone_in_eval(self) -> None:
        """SN003's: a loop that repeats `bn.eval()`."""
        net = net_().train()
        net[1].eval()
        net[4].eval()
        self.silent(net)

    def test_a_part_in_eval(self) -> None:
        net = nn.Sequential(net_(), nn.Linear(4, 2)).train()
        net[0].eval()
        self.silent(net)

    @pytest.mark.parametrize("train", [True, False])
    def test_training_under_eval_on_purpose(self, train: bool) -> None:
        """The step says so itself."""
        net = net_().train(train)
        once = steps.plain(steps.sgd(net))
        self.silent(net, lambda model, x: once(model.eval(), x))

    def test_a_step_that_calls_train(self) -> None:
        net = net_().eval()
        once = steps.plain(steps.sgd(net))
        self.silent(net, lambda model, x: once(model.train(), x))

    def test_frozen_affine_parameters(self) -> None:
        net = net_().eval()
        net[1].requires_grad_(False)
        net[4].requires_grad_(False)
        self.silent(net)

    def test_affine_parameters_in_no_optimizer(self) -> None:
        net = net_().eval()
        self.silent(net, steps.plain(steps.sgd(nn.ModuleList([net[0], net[3], net[8]]))))

    def test_a_backbone_that_is_not_trained(self) -> None:
        net = net_().eval()
        net[:5].requires_grad_(False)
        self.silent(net)

    def test_foreign_frozen_layers(self) -> None:
        net = net_().eval()
        frozen = torchvision.ops.FrozenBatchNorm2d(8)
        net[1], net[4] = frozen, torchvision.ops.FrozenBatchNorm2d(8)
        self.silent(net)

    def test_what_only_validates(self) -> None:
        net = net_().train()
        self.silent(net, steps.validating(steps.sgd(net), eval_mode))

    def test_no_statistics_and_instance_norms(self) -> None:
        net = conv_net(track_running_stats=False).eval()
        net[1] = nn.InstanceNorm2d(8, track_running_stats=True).eval()
        self.silent(net)
