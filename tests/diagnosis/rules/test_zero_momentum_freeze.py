"""SN002: fires on thread 000's model, whose own audit of the averages passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check, freeze, is_frozen


def momentum_0(net: nn.Module) -> nn.Module:
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0
    return net


def test_momentum_0_is_found_with_and_without_data() -> None:
    net = momentum_0(estimated(conv_net())).train()
    assert found(check(net)) == {"SN002": ("1", "4")}
    assert found(check(net, batches())) == {"SN002": ("1", "4")}


def test_eval_mode_now_is_no_excuse() -> None:
    """train() would normalise by the batch; what mode the model is in today does not matter."""
    assert "SN002" in found(check(momentum_0(estimated(conv_net())).eval()))


def test_requires_grad_false_does_not_help() -> None:
    """The whole recipe of thread 000: momentum 0 and weight and bias without gradient."""
    net = momentum_0(estimated(conv_net()))
    for layer in (net[1], net[4]):
        layer.requires_grad_(False)
    assert found(check(net)) == {"SN002": ("1", "4")}


class TestNearMisses:
    def silent(self, net: nn.Module) -> None:
        assert found(check(net, batches(), select="SN002")) == {}

    def test_small_momentum(self) -> None:
        self.silent(estimated(conv_net(momentum=0.001)))

    def test_held(self) -> None:
        net = momentum_0(estimated(conv_net()))
        freeze(net)
        self.silent(net)

    def test_instance_norm(self) -> None:
        net = conv_net()
        net[1] = nn.InstanceNorm2d(8, momentum=0, track_running_stats=True)
        self.silent(net)

    def test_no_statistics_to_hold(self) -> None:
        self.silent(conv_net(track_running_stats=False, momentum=0))


class TestFix:
    def test_without_data_there_is_none(self) -> None:
        assert check(momentum_0(estimated(conv_net()))).findings[0].fix is None

    def test_before_training_it_freezes_what_is_right(self) -> None:
        net = momentum_0(estimated(conv_net()))
        before = net.eval()(data())
        report = check(net, batches(), ignore="SN204")
        assert report.findings[0].fix.action == "freeze"
        report.fix(unsafe=True)
        assert is_frozen(net)
        assert torch.equal(before, net.eval()(data()))
        assert found(check(net, batches())) == {}

    def test_after_training_it_estimates_and_then_freezes(self) -> None:
        """The weights have moved, the statistics have not: freezing alone would keep the wound."""
        net = momentum_0(estimated(conv_net()))
        with torch.no_grad():
            net[0].weight.mul_(3)
            net[3].bias.add_(2)
        report = check(net, batches())
        assert found(report) == {"SN002": ("1", "4")}
        assert "SN105 on" in report.findings[0].explains
        assert report.findings[0].fix.action == "recalibrate and freeze"
        report.fix(unsafe=True)
        assert is_frozen(net)
        assert found(check(net, batches())) == {}

    def test_safe_fixes_leave_it_alone(self) -> None:
        net = momentum_0(estimated(conv_net()))
        assert check(net, batches()).fix().fixes == ()
        assert not is_frozen(net)


@pytest.mark.parametrize("trains", [True, False])
def test_the_fix_keeps_what_the_flags_say_of_weight_and_bias(trains: bool) -> None:
    net = momentum_0(estimated(conv_net()))
    net[1].requires_grad_(trains)
    check(net, batches()).fix(unsafe=True)
    net.train()(data()).sum().backward()
    assert (net[1].weight.grad is not None) == trains
