"""SN108: 0.9 and above is another framework's convention; 0.5 is a choice."""

from __future__ import annotations

import pytest
from torch import nn

from diagnosis.nets import conv_net, estimated, found
from stillnorm import check, freeze
from support.zoo import CLASSIFIERS


@pytest.mark.parametrize("momentum", [0.9, 0.99, 0.997, 1.0])
def test_keras_momenta_are_found(momentum: float) -> None:
    assert found(check(conv_net(momentum=momentum))) == {"SN108": ("1", "4")}


@pytest.mark.parametrize("momentum", [0.001, 0.01, 0.1, 0.5, None])
def test_torch_momenta_are_not(momentum: float | None) -> None:
    """0.5 is what the post of thread 001 itself uses; 0.01 is right in ports of EfficientNet."""
    assert found(check(conv_net(momentum=momentum))) == {}


def test_layers_that_update_nothing_are_not() -> None:
    held = estimated(conv_net(momentum=0.99))
    freeze(held)
    assert found(check(held)) == {}
    untracked = nn.Sequential(nn.InstanceNorm2d(3, momentum=0.99))
    assert found(check(untracked)) == {}


def test_a_published_model_has_it() -> None:
    """transformers' MobileNetV2 carries TensorFlow's 0.997 (huggingface/transformers#19454)."""
    report = check(CLASSIFIERS["transformers/mobilenet_v2"](), select="SN108")
    assert len(report.findings[0].paths) == 52


def test_the_fix_turns_it_around() -> None:
    net = conv_net(momentum=0.99)
    applied = check(net).fix(unsafe=True)
    assert net[1].momentum == 0.01
    assert found(check(net)) == {}
    applied.undo()
    assert net[1].momentum == 0.99


def test_momentum_1_has_no_counterpart() -> None:
    """1 - 1 would be 0, which is SN002."""
    assert check(conv_net(momentum=1.0)).findings[0].fix is None
