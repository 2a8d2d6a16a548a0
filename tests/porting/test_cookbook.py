"""What docs/porting.md says of layers without weights: the wrong twin is found."""

from __future__ import annotations

from typing import Any

import keras
import pytest
import torch
from keras import layers
from torch import nn

import stillnorm as sn
from porting.twins import filled
from stillnorm.errors import PortError


class Crop(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, :-1, :-1]


def conv() -> list[Any]:
    return [layers.Conv2D(4, 1)]


def dense() -> list[Any]:
    return [layers.Dense(4)]


INFINITY = float("inf")
ONE, FLAT = nn.Conv2d(3, 4, 1), nn.Linear(3, 4)
STRIDED = {"strides": 2, "padding": "same"}

LINES: dict[str, tuple[list[Any], list[nn.Module], list[nn.Module]]] = {
    "same, stride 2": (
        [layers.Conv2D(4, 3, **STRIDED)],
        [nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, 2)],
        [nn.Conv2d(3, 4, 3, 2, 1)],
    ),
    "transposed, kernel 3": (
        [layers.Conv2DTranspose(4, 3, **STRIDED)],
        [nn.ConvTranspose2d(3, 4, 3, 2), Crop()],
        [nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1)],
    ),
    "transposed, kernel 4": (
        [layers.Conv2DTranspose(4, 4, **STRIDED)],
        [nn.ConvTranspose2d(3, 4, 4, 2, 1)],
        [nn.ConvTranspose2d(3, 4, 4, 2), Crop(), Crop()],
    ),
    "max pool, same": (
        [*conv(), layers.MaxPooling2D(3, **STRIDED)],
        [ONE, nn.ConstantPad2d((0, 1, 0, 1), -INFINITY), nn.MaxPool2d(3, 2)],
        [ONE, nn.MaxPool2d(3, 2, 1)],
    ),
    "zeros before a max pool": (
        [*conv(), layers.ZeroPadding2D(1), layers.MaxPooling2D(3, 2)],
        [ONE, nn.ZeroPad2d(1), nn.MaxPool2d(3, 2)],
        [ONE, nn.MaxPool2d(3, 2, 1)],
    ),
    "average pool, same": (
        [*conv(), layers.AveragePooling2D(3, 1, padding="same")],
        [ONE, nn.AvgPool2d(3, 1, 1, count_include_pad=False)],
        [ONE, nn.AvgPool2d(3, 1, 1)],
    ),
    "LeakyReLU": (
        [*dense(), layers.LeakyReLU()],
        [FLAT, nn.LeakyReLU(0.3)],
        [FLAT, nn.LeakyReLU()],
    ),
    "leaky_relu": (
        [layers.Dense(4, activation="leaky_relu")],
        [FLAT, nn.LeakyReLU(0.2)],
        [FLAT, nn.LeakyReLU()],
    ),
    "gelu": (
        [layers.Dense(4, activation="gelu")],
        [FLAT, nn.GELU()],
        [FLAT, nn.GELU("tanh")],
    ),
}


@pytest.mark.parametrize("name", LINES)
def test_a_line(name: str) -> None:
    given, right, wrong = LINES[name]
    shape = (8, 8, 3) if isinstance(given[0], layers.Conv2D | layers.Conv2DTranspose) else (3,)
    there = filled(keras.Sequential([keras.Input(shape), *given]))
    x = torch.randn(16, *shape)
    assert sn.port.from_keras(there, nn.Sequential(*right), example=x).agreement
    with pytest.raises(PortError, match="eval outputs differ"):
        sn.port.from_keras(there, nn.Sequential(*wrong), example=x)


def test_an_odd_size_is_padded_on_both_sides() -> None:
    there = filled(keras.Sequential([keras.Input((9, 9, 3)), layers.Conv2D(4, 3, **STRIDED)]))
    x = torch.randn(2, 9, 9, 3)
    assert sn.port.from_keras(there, nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1)), example=x).agreement
