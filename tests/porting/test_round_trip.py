"""There and back is where it began, bit for bit, and either model computes what the other does."""

from __future__ import annotations

import keras
import pytest
import torch
from torch import nn

import stillnorm as sn
from porting.twins import (
    PAIRS,
    ResNet50,
    calibrated_resnet50,
    dense_net,
    dense_twin,
    filled,
    image_net,
    image_twin,
    same,
    values,
)
from stillnorm.errors import PortError
from stillnorm.porting.keras.parts import as_torch


@pytest.mark.parametrize("name", PAIRS)
def test_from_keras_and_back(name: str) -> None:
    make, twin_of, shape = PAIRS[name]
    there, here, x = make(), twin_of(), torch.randn(shape)
    # float32 on either side, a few layers deep: rounding and nothing else.
    report = sn.port.from_keras(there, here, example=x, tolerance=5e-6)
    assert report.agreement
    assert len(report.agreement.statistics) == sum(
        one.kind == "batch norm" for one in report.ported
    )
    assert all(one.values is not None for one in report.agreement.statistics)

    again = filled(keras.models.clone_model(there), seed=1)
    assert not same(values(again), values(there))
    back = sn.port.to_keras(here, again, example=x, tolerance=5e-6)
    assert [(one.name, one.path) for one in back.ported] == [
        (one.name, one.path) for one in report.ported
    ]
    assert same(values(again), values(there))
    settings = [
        [(one.epsilon, one.momentum, one.trainable) for one in norms_of(model)]
        for model in (there, again)
    ]
    assert settings[0] == settings[1]


@pytest.mark.parametrize("name", PAIRS)
def test_to_keras_and_back(name: str) -> None:
    make, twin_of, shape = PAIRS[name]
    here = twin_of()
    sn.port.from_keras(make(), here)
    here.train()
    moved = torch.randn(shape) if "axis=1" in name else torch.randn(shape).movedim(-1, 1)
    for _ in range(3):
        here(moved)
    again = twin_of()
    between = filled(make(), seed=2)
    sn.port.to_keras(here, between)
    sn.port.from_keras(between, again)
    expected = {k: v for k, v in here.state_dict().items() if "num_batches" not in k}
    for key, value in expected.items():
        assert torch.equal(again.state_dict()[key], value), key


def norms_of(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    flat = model._flatten_layers()
    return [layer for layer in flat if isinstance(layer, keras.layers.BatchNormalization)]


def test_resnet50_there_and_back() -> None:
    x = torch.randn(4, 64, 64, 3)
    there, here = calibrated_resnet50(x, classes=7), ResNet50(classes=7)
    # Fifty layers deep, torch in float32 is 2e-4 from torch in float64. The last maps are 2 x 2.
    report = sn.port.from_keras(there, here, example=x, tolerance=1e-3)
    assert report.matched == "names"
    assert len(report.ported) == 53 + 53 + 1
    assert report.agreement
    assert report.agreement.largest > 0.01
    assert min(one.values for one in report.agreement.statistics) == 16

    again = keras.models.clone_model(there)
    assert not same(values(again), values(there))
    sn.port.to_keras(here, again, example=x, tolerance=1e-3)
    assert same(values(again), values(there))


def test_resnet50_of_another_make_is_refused() -> None:
    """The stride of the later kind is in the 3x3 convolution; the shapes are all the same."""
    there, here = keras.applications.ResNet50(weights=None, classes=7), ResNet50(classes=7)
    block = here.get_submodule("conv3_block1")
    block.get_submodule("1_conv").stride = (1, 1)
    block.get_submodule("2_conv").stride = (2, 2)
    with pytest.raises(PortError, match=r"conv3_block1_1_conv is a convolution 1x1 256 -> 128"):
        sn.port.from_keras(there, here)


def test_training_goes_on_alike() -> None:
    """Three steps in train mode, forward and update: momentum, eps and affine are the same."""
    there, here = dense_net(), dense_twin()
    for layer in there.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0
    here[3].p = 0.0
    sn.port.from_keras(there, here)
    x, y = torch.randn(64, 6), torch.randn(64, 3)
    there.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
    optimizer = torch.optim.SGD(here.parameters(), lr=0.1)
    here.train()
    for _ in range(3):
        there.train_on_batch(x.numpy(), y.numpy())
        optimizer.zero_grad()
        nn.functional.mse_loss(here(x), y).backward()
        optimizer.step()
    assert sn.port.compare(there, here, x, tolerance=0.01).same_outputs
    # The biased variance on one side, the unbiased on the other: 64 / 63 of what was learnt.
    mean = as_torch(norms_of(there)[0].moving_mean.value)
    torch.testing.assert_close(here[2].running_mean, mean, rtol=1e-4, atol=1e-5)


def test_with_the_count_the_variance_is_of_the_others_convention() -> None:
    x = torch.randn(8, 6)
    there, here = dense_net(), dense_twin()
    (norm,) = norms_of(there)
    seen = keras.Model(there.inputs, norm.input)(keras.ops.convert_to_tensor(x.numpy()))
    norm.momentum = 0.0
    there(keras.ops.convert_to_tensor(x.numpy()), training=True)  # the moments of this batch
    norm.momentum = 0.99
    report = sn.port.from_keras(there, here, count=8, example=x)
    torch.testing.assert_close(here[2].running_var, as_torch(seen).var(0))
    assert "times n / (n - 1)" in report.variance

    again = keras.models.clone_model(there)
    sn.port.to_keras(here, again, count={"2": 8})
    for a, b in zip(values(again), values(there), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    report.undo()


def test_norms_alone() -> None:
    there, here = image_net(), image_twin()
    weight = here[0].weight.clone()
    report = sn.port.from_keras(there, here, which="norms")
    assert [one.kind for one in report.ported] == ["batch norm"] * 4
    assert torch.equal(here[0].weight, weight)
    assert torch.equal(here[1].weight, values(there)[2])


def test_a_half_precision_model_gets_rounded_values() -> None:
    there, here = dense_net(), dense_twin().half()
    sn.port.from_keras(there, here)
    assert here[2].running_var.dtype == torch.float16
    expected = values(there)[5].half()
    assert torch.equal(here[2].running_var, expected)


def test_bfloat16_variables() -> None:
    there = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype="bfloat16")])
    here = nn.Sequential(nn.Linear(4, 3))
    sn.port.from_keras(there, here)
    again = keras.models.clone_model(there)
    sn.port.to_keras(here, again)
    assert here[0].weight.dtype == torch.float32
    assert same(values(again), values(there))
