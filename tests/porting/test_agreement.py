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


def test_a_norm_without_statistics(ported: Any) -> None:
    there, here, x = ported
    here[2] = nn.BatchNorm1d(10, track_running_stats=False)
    agreed = sn.port.compare(there, here, x)
    assert agreed.settings == (("2", "has no running statistics in torch"),)
    with pytest.raises(PortError, match="2: has no running statistics in torch"):
        sn.port.from_keras(there, here, example=x, strict=False)


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
    assert json.loads(report.agreement.to_json())["tolerance"] < 1e-4
    assert str(report.agreement).startswith("the models agree")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_the_example_gets_the_models_dtype(ported: Any, dtype: torch.dtype) -> None:
    there, here, x = ported
    assert sn.port.compare(there, here, x.to(dtype))
    if dtype == torch.float64:
        assert sn.port.compare(there, here, x.double().numpy())
        assert sn.port.compare(there, here.double(), x)


def test_an_example_that_is_not_taken(ported: Any) -> None:
    there, here, x = ported
    for example in (torch.randn(16, 7), x.tolist(), "x", {"input": x}):
        with pytest.raises(PortError, match="the Keras model does not take the example: "):
            sn.port.compare(there, here, example)
    for example in (x.long(), torch.randn(3)):
        with pytest.raises(PortError, match="the torch model does not take the example: "):
            sn.port.compare(there, here, x, torch_example=example)
    with pytest.raises(PortError, match="on the meta device"):
        sn.port.compare(there, dense_twin().to("meta"), x)


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), "1e-3"])
def test_a_tolerance_that_cannot_be(ported: Any, tolerance: Any) -> None:
    there, here, x = ported
    with pytest.raises(ValueError, match="is no number of 0 or more"):
        sn.port.compare(there, here, x, tolerance=tolerance)


def test_what_learns_is_a_setting(ported: Any) -> None:
    there, here, x = ported
    here[2].weight.requires_grad_(False)
    agreed = sn.port.compare(there, here, x)
    assert agreed.settings == (("2", "requires_grad of weight is False in torch, True in Keras"),)
    there.layers[1].gamma.trainable = False
    assert sn.port.compare(there, here, x)


class Noise(layers.Layer):
    def __init__(self) -> None:
        super().__init__(name="mine")
        self.drawn = keras.random.SeedGenerator(1)

    def call(self, x: Any, training: bool = False) -> Any:
        return x + keras.random.normal(x.shape, seed=self.drawn) if training else x


class Dropping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    ("inside", "twin", "why"),
    [
        (layers.Dropout(0.5), Dropping(), "the torch model is random in train mode"),
        (layers.Dropout(0.5), nn.RReLU(1, 1.1), "the torch model is random in train mode"),
        (Noise(), nn.Identity(), "mine, a Noise, is random in train mode"),
    ],
)
def test_whatever_is_random_leaves_the_step_out(inside: Any, twin: nn.Module, why: str) -> None:
    there = keras.Sequential([keras.Input((6,)), inside, layers.BatchNormalization()])
    here, x = nn.Sequential(twin, nn.BatchNorm1d(6)), torch.randn(8, 6)
    report = sn.port.from_keras(there, here, example=x, tolerance=2)
    assert why in report.agreement.not_compared


def test_outputs_with_names_are_compared_by_name() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"second": self.b(x), "first": self.a(x)}

    given = keras.Input((4,))
    outputs = {n: layers.Dense(3, name=m)(given) for n, m in (("first", "a"), ("second", "b"))}
    there = filled(keras.Model(given, outputs))
    assert sn.port.from_keras(there, Two(), example=torch.randn(5, 4)).agreement


def test_a_norm_that_is_called_on_batches_of_several_sizes() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.norm(x)[:, :, :2, :1])

    given, norm = keras.Input((6, 6, 3)), layers.BatchNormalization()
    there = filled(keras.Model(given, norm(layers.Cropping2D(((0, 4), (0, 5)))(norm(given)))))
    here, x = Twice(), torch.randn(2, 6, 6, 3)
    assert sn.port.from_keras(there, here, example=x).agreement.statistics[0].values == 4
    here.norm.momentum = 0.02
    assert not sn.port.compare(there, here, x).same_statistics
