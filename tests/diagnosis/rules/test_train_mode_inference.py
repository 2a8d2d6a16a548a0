"""SN006: fires when `predict` lets norms use the batch, and on nothing that only looks like it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diagnosis.nets import conv_net, data, estimated, found
from stillnorm import check, eval_mode, freeze, no_updates
from stillnorm.diagnosis import Report
from stillnorm.diagnosis.finding import Finding
from support.zoo import images, make

Predict = Callable[[nn.Module, Any], Any]


def no_eval(model: nn.Module, batch: Tensor) -> Tensor:
    with torch.no_grad():
        return model(batch)


def with_eval(model: nn.Module, batch: Tensor) -> Tensor:
    with eval_mode(model), torch.no_grad():
        return model(batch)


def asked(net: nn.Module, predict: Predict, x: object = None) -> Report:
    report = check(net, data(16) if x is None else x, predict=predict, select="SN006")
    assert report.crashed == ()
    return report


def the_finding(net: nn.Module, predict: Predict, x: object = None) -> Finding:
    (finding,) = asked(net, predict, x).findings
    return finding


class TestFires:
    def test_no_grad_is_not_eval(self) -> None:
        net = estimated(conv_net()).train()
        finding = the_finding(net, no_eval)
        assert (finding.severity, finding.paths) == ("error", ("1", "4"))
        assert finding.evidence["by_batch"] == {"1": 16, "4": 16}
        assert "gradients are off, which is not eval()" in finding.note
        assert "the model came in train mode" in finding.note

    def test_its_numbers_are_those_of_the_prediction(self) -> None:
        net = estimated(conv_net()).train()
        x = data(16)
        finding = the_finding(net, no_eval, x)
        before = net[1].running_mean.double()
        sigma = (net[1].running_var.double() + net[1].eps).sqrt()
        whole, alone = no_eval(net, x).double(), no_eval(net, x[:8]).double()
        moved = (whole[:8] - alone).square().mean().sqrt() / whole.std()
        assert finding.evidence["answers"] == finding.evidence["answers_changed"] == 8
        assert finding.evidence["answers_moved"] == pytest.approx(float(moved), rel=1e-3)
        batch_mean = net[0](x).detach().mean((0, 2, 3)).double()
        shift = (0.1 * (batch_mean - before) / sigma).square().mean().sqrt()
        assert finding.evidence["mean_moved"]["1"] == pytest.approx(float(shift), rel=1e-3)

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_whatever_the_gradients(self, mode: Callable[[], Any]) -> None:
        def predict(model: nn.Module, batch: Tensor) -> Tensor:
            with mode():
                return model(batch)

        finding = the_finding(estimated(conv_net()).train(), predict)
        assert finding.severity == "error"
        assert ("gradients are off" in finding.note) is (mode is not torch.enable_grad)

    def test_a_predict_that_calls_train_itself(self) -> None:
        net = estimated(conv_net()).eval()
        finding = the_finding(net, lambda model, batch: model.train()(batch))
        assert "came in train mode" not in finding.note
        assert not net.training

    def test_one_layer_left_in_train_mode_is_named_alone(self) -> None:
        net = estimated(conv_net()).eval()
        net[4].train()
        assert the_finding(net, no_eval).paths == ("4",)

    def test_monte_carlo_dropout_by_train(self) -> None:
        net = nn.Sequential(estimated(conv_net()), nn.Dropout(0.5)).train()
        finding = the_finding(net, no_eval)
        assert finding.severity == "error"
        assert finding.evidence["answers_changed"] is None
        assert "the answers are random" in finding.note
        assert "dropout is active too" in finding.note
        assert "dropout layers only" in finding.help

    def test_labels_are_answers_too(self) -> None:
        net = estimated(conv_net()).train()
        for _ in range(20):  # statistics of this batch: no label need change by itself
            net(data(16))
        finding = the_finding(net, lambda model, batch: [*map(int, model(batch).argmax(1))])
        assert finding.evidence["answers"] == 8
        assert finding.severity == "error"

    def test_a_subclass_that_ignores_its_mode(self) -> None:
        """The kernel tells, not the flag."""

        class Always(nn.BatchNorm2d):
            def forward(self, x: Tensor) -> Tensor:
                return F.batch_norm(x, None, None, self.weight, self.bias, training=True)

        net = conv_net().eval()
        net[1] = Always(8).eval()
        assert the_finding(net, with_eval).paths == ("1",)

    def test_statistics_that_move_are_enough(self) -> None:
        """AdaBN: a pass in train mode, the answers in eval mode."""

        def adapt(model: nn.Module, batch: Tensor) -> Tensor:
            model.train()(batch)
            return model.eval()(batch)

        finding = the_finding(estimated(conv_net()), adapt)
        assert finding.evidence["mean_moved"].keys() == {"1", "4"}
        assert finding.severity == "error"

    @pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm3d])
    def test_other_ranks(self, norm: type[nn.Module]) -> None:
        shape = (16, 4, *[6] * (1 if norm is nn.BatchNorm1d else 3))
        net = nn.Sequential(norm(4), nn.Flatten())
        assert the_finding(net, no_eval, 3 + torch.randn(shape)).paths == ("0",)

    def test_an_instance_norm_that_tracks_moves(self) -> None:
        net = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.Flatten())
        finding = the_finding(net, no_eval)
        assert finding.evidence["by_batch"] == {}
        assert finding.message == "predict moves the statistics of 1 layer"

    def test_samples_one_by_one_without_updates_are_a_warning(self) -> None:
        """No answer depends on another sample: instance statistics, maybe on purpose."""

        def one_by_one(model: nn.Module, batch: Tensor) -> Tensor:
            with no_updates(model):
                return torch.cat([model(x[None]) for x in batch])

        finding = the_finding(estimated(conv_net()).train(), one_by_one)
        assert finding.severity == "warning"
        assert finding.evidence["answers_changed"] == 0

    def test_samples_together_whose_answers_are_random_are_an_error(self) -> None:
        def sampled(model: nn.Module, batch: Tensor) -> Tensor:
            with no_updates(model):
                return model(batch)

        net = nn.Sequential(estimated(conv_net()), nn.Dropout(0.5)).train()
        finding = the_finding(net, sampled)
        assert (finding.severity, finding.evidence["mean_moved"]) == ("error", {})

    def test_other_mixing_of_samples_is_not_blamed_on_norms(self) -> None:
        net = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.Flatten())
        finding = the_finding(net, lambda model, x: model(x).softmax(0))
        assert finding.evidence["answers"] is None
        assert "answer" not in finding.note

    @pytest.mark.parametrize("n", [1, 2, 3])
    def test_small_batches(self, n: int) -> None:
        finding = the_finding(estimated(conv_net()).train(), no_eval, data(n))
        assert finding.severity == "error"
        assert finding.evidence["answers"] == (None if n == 1 else 1)

    @pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/lcnet_050"])
    def test_real_models(self, name: str) -> None:
        net, x = make(name), images(8, seed=5)
        assert found(asked(net, no_eval, x)) == {}
        report = check(net.train(), x, predict=no_eval)
        assert set(found(report)) == {"SN006"}


def test_validation_inside_the_step_is_explained_by_it() -> None:
    """SN306 sees the same mistake from the side of training: one cause, one finding."""

    def train_step(model: nn.Module, batch: Tensor) -> None:
        model.train()(batch).sum().backward()
        no_eval(model, batch)

    net = estimated(conv_net()).train()
    given = {"train_step": train_step, "select": "SN006,SN306"}
    assert found(check(net, data(16), **given)) == {"SN306": ("1", "4")}
    report = check(net, data(16), predict=no_eval, **given)
    assert found(report) == {"SN006": ("1", "4")}
    assert report.findings[0].explains == "SN306 on 1, 4 (not repeated)"


class TestNearMisses:
    def silent(self, net: nn.Module, predict: Predict) -> None:
        assert asked(net, predict).findings == ()

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_a_predict_that_calls_eval(self, mode: str) -> None:
        self.silent(getattr(estimated(conv_net()), mode)(), with_eval)

    def test_a_model_that_came_in_eval_mode(self) -> None:
        self.silent(estimated(conv_net()).eval(), no_eval)

    def test_only_the_dropout_layers_in_train_mode(self) -> None:
        def monte_carlo(model: nn.Module, batch: Tensor) -> Tensor:
            model.eval()[1].train()
            return torch.stack([model(batch) for _ in range(4)])

        self.silent(nn.Sequential(estimated(conv_net()), nn.Dropout(0.5)), monte_carlo)

    def test_held_layers_in_train_mode(self) -> None:
        net = estimated(conv_net())
        freeze(net)
        self.silent(net.train(), no_eval)

    def test_instance_and_other_norms(self) -> None:
        net = conv_net()
        net[1], net[4] = nn.InstanceNorm2d(8), nn.GroupNorm(2, 8)
        self.silent(net.train(), no_eval)

    def test_layers_without_statistics_are_of_another_rule(self) -> None:
        net = conv_net(track_running_stats=False).train()
        self.silent(net, no_eval)
        report = check(net, data(16), predict=no_eval)
        assert set(found(report)) == {"SN107"}

    def test_answers_that_mix_samples_without_any_norm(self) -> None:
        self.silent(estimated(conv_net()).eval(), lambda m, x: m(x).softmax(0))

    @pytest.mark.parametrize("x", [None, data(16)], ids=["alone", "with batches"])
    def test_without_predict_it_is_not_run(self, x: Tensor | None) -> None:
        report = check(conv_net(), x, select="SN006")
        assert "needs predict=" in [m.reason for m in report.not_run if m.code == "SN006"]
