"""SN114: a norm that no forward calls, in neither mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diagnosis.nets import batches, conv_net, data, estimated
from stillnorm import check
from support.zoo import torchvision


class Net(nn.Module):
    """`aux` is called in train mode only, `spare` never."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.aux, self.spare = conv_net(), nn.BatchNorm2d(3), nn.BatchNorm2d(7)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.aux(x) if self.training else x)


def unreached(report) -> list[tuple[str, ...]]:
    assert not report.crashed
    return [f.paths for f in report.findings if f.code == "SN114"]


def test_a_layer_that_no_mode_calls_is_named_and_others_are_not() -> None:
    report = check(Net(), batches())
    assert unreached(report) == [("spare",)]
    assert all(f.severity == "info" for f in report.findings if f.code == "SN114")


class TestNearMisses:
    def test_every_layer_called(self) -> None:
        assert unreached(check(estimated(conv_net()), batches())) == []

    def test_inception_in_eval(self) -> None:
        """Its auxiliary head runs in train mode alone."""
        net = torchvision.models.googlenet(init_weights=False, num_classes=4, aux_logits=True)
        report = check(net.eval(), data(2).repeat(1, 1, 8, 8), select="SN114")
        assert unreached(report) == []
        assert report.not_run == ()

    def test_a_layer_whose_statistics_a_function_is_given(self) -> None:
        class Lent(Net):
            def forward(self, x: Tensor) -> Tensor:
                bn = self.spare
                x = F.batch_norm(x[:, [0] * 7], bn.running_mean, bn.running_var, bn.weight)
                return super().forward(x[:, :3])

        assert unreached(check(Lent(), batches(), select="SN114")) == []

    def test_a_layer_that_only_train_mode_gives_to_a_function(self) -> None:
        class Lent(Net):
            def forward(self, x: Tensor) -> Tensor:
                if self.training:
                    bn = self.spare
                    x = F.batch_norm(x[:, [0] * 7], bn.running_mean, bn.running_var)[:, :3]
                return super().forward(x)

        assert unreached(check(Lent(), batches(), select="SN114")) == []


def test_a_model_that_cannot_be_called_in_train_mode_is_said_to_be_undecided() -> None:
    class Detector(Net):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("targets should not be None")
            return super().forward(x)

    report = check(Detector(), batches(), select="SN114")
    assert unreached(report) == []
    (missed,) = report.not_run
    assert missed.code == "SN114"
    assert "targets should not be None" in missed.reason


@pytest.mark.parametrize("training", [True, False])
def test_looking_in_train_mode_leaves_the_model_as_it_was(training: bool) -> None:
    net = Net().train(training)
    net.net[1].eval()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    check(net, batches(), select="SN114")
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert (net.training, net.net[1].training) == (training, False)
