"""The comparison of two models finds what a port gets wrong, and says what it did not compare."""

from __future__ import annotations

import json
from typing import Any

import keras
import pytest
import torch
from keras import layers
from torch import nn

import stillnorm as sn
from porting.twins import dense_net, dense_twin, filled, image_net, image_twin
from stillnorm.errors import PortError


@pytest.fixture
def ported() -> tuple[Any, nn.Sequential, torch.Tensor]:
    there, here, x = dense_net(), dense_twin(), torch.randn(16, 6)
    sn.port.from_keras(there, here)
    assert sn.port.compare(there, here, x)
    return there, here, x


@pytest.mark.parametrize("momentum", [0.99, 0.1, 0.0])
def test_a_wrong_momentum(ported: Any, momentum: float) -> None:
    there, here, x = ported
    here[2].momentum = momentum
    agreed = sn.port.compare(there, here, x)
    assert agreed.same_outputs
    assert not agreed.same_statistics
    assert not agreed
    assert f"2: momentum is {momentum} in torch, 0.01 in Keras" in str(agreed)


def test_a_wrong_eps(ported: Any) -> None:
    """Where variances are large the outputs hardly tell."""
    there, here, x = ported
    here[2].eps = 1e-5
    agreed = sn.port.compare(there, here, x)
    assert agreed.same_statistics
    assert not agreed
    assert agreed.settings == (("2", "eps is 1e-05 in torch, 0.001 in Keras"),)
    with torch.no_grad():
        here[2].running_var.fill_(1e-4)
    there.layers[1].moving_variance.assign(here[2].running_var.numpy())
    assert not sn.port.compare(there, here, x).same_outputs


def test_a_layer_frozen_on_one_side(ported: Any) -> None:
    there, here, x = ported
    there.layers[1].trainable = False
    agreed = sn.port.compare(there, here, x)
    assert agreed.same_outputs
    assert not agreed.same_statistics
    assert "frozen is False in torch, True in Keras" in str(agreed)


def test_statistics_by_the_biased_variance_are_seen(ported: Any) -> None:
    """Of 16 values: without n / (n - 1) a sixteenth of what the batch adds is missing."""

    class Biased(nn.BatchNorm1d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                var, mean = torch.var_mean(x, 0, correction=0)
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var, self.momentum)
            return super().forward(x) if not self.training else x

    there, here, x = ported
    twin = Biased(10)
    twin.load_state_dict(here[2].state_dict())
    twin.eps, twin.momentum = here[2].eps, here[2].momentum
    here[2] = twin
    agreed = sn.port.compare(there, here, x)
    (row,) = agreed.statistics
    assert row.mean < 1e-6
    assert row.variance == pytest.approx(1 / 16, rel=1e-3)
    assert row.values == 16


def test_nan_is_a_difference(ported: Any) -> None:
    there, here, x = ported
    with torch.no_grad():
        here[4].weight[0, 0] = float("nan")
    assert not sn.port.compare(there, here, x).same_outputs


def test_other_outputs_raise() -> None:
    there, here = image_net(), image_twin()
    here.append(nn.Unflatten(1, (5, 1)))
    with pytest.raises(PortError, match=r"an output is \(6, 5\) in Keras and \(6, 5, 1\) in torch"):
        sn.port.compare(there, here, torch.randn(6, 9, 7, 3))


def test_several_inputs_and_outputs() -> None:
    a, b = keras.Input((4,)), keras.Input((6, 3))
    x, y = layers.Dense(3, name="one")(a), layers.Conv1D(3, 2, name="two")(b)
    there = filled(keras.Model([a, b], [x, y]))

    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 3), nn.Conv1d(3, 3, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> Any:
            return {"x": self.one(a), "y": self.two(b)}

    example = (torch.randn(5, 4), torch.randn(5, 6, 3))
    report = sn.port.from_keras(there, Twin(), example=example)
    assert report.agreement

    one = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(PortError, match="gives 2 outputs, the torch model 1"):
        sn.port.from_keras(
            there, one, names={"one": "0"}, example=example, torch_example=example[0]
        )


def test_another_example_for_torch() -> None:
    """A dense layer on the last axis: the channels stay where they are in torch, too."""
    there = filled(
        keras.Sequential(
            [keras.Input((6, 3)), layers.Conv1D(4, 1), layers.BatchNormalization(), layers.ReLU()]
        )
    )

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x.movedim(-1, 1))).relu().movedim(1, -1)

    x = torch.randn(5, 6, 3)
    assert sn.port.from_keras(there, Last(), example=x, torch_example=x).agreement
    assert sn.port.from_keras(there, Last(), example=x.numpy(), torch_example=x).agreement


def test_random_layers_leave_the_step_out() -> None:
    there = filled(
        keras.Sequential(
            [
                keras.Input((6,)),
                layers.GaussianNoise(0.1, name="noise"),
                layers.BatchNormalization(),
            ]
        )
    )
    report = sn.port.from_keras(there, nn.BatchNorm1d(6), example=torch.randn(8, 6))
    assert report.agreement
    assert report.agreement.statistics == ()
    assert "not compared: noise, a GaussianNoise, is random in train mode" in str(report)


def test_one_sample_leaves_the_step_out() -> None:
    report = sn.port.from_keras(dense_net(), dense_twin(), example=torch.randn(1, 6))
    assert report.agreement
    assert "Expected more than 1 value per channel" in report.agreement.not_compared


def test_written(ported: Any) -> None:
    there, here, x = ported
    report = sn.port.from_keras(there, here, example=x)
    text = str(report)
    assert text.startswith("3 layers ported to torch, 1 of them batch norms, matched by order")
    assert "kept as it is, so that eval outputs stay the same" in text
    told = json.loads(report.to_json())
    assert told["agreement"]["statistics"][0]["values"] == 16
    assert json.loads(report.agreement.to_json())["tolerance"] == 1e-3
    assert str(report.agreement).startswith("the models agree")
