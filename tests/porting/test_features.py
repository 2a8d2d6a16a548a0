"""A layer behind a flatten takes its features in another order in torch, wherever that is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import pytest
import torch
from keras import layers, ops
from torch import Tensor, nn

import stillnorm as sn
from porting.twins import filled, same, values
from stillnorm.errors import PortError

FLAT = 4 * 4 * 5


def conv(x: Any) -> Any:
    return layers.Conv2D(5, 3)(x)


def inner(*inside: Any) -> Any:
    return keras.Sequential(list(inside))


BEHIND: dict[str, Callable[[Any], Any]] = {
    "Flatten": lambda x: layers.Flatten()(conv(x)),
    "Reshape": lambda x: layers.Reshape((-1,))(conv(x)),
    "ops.reshape": lambda x: ops.reshape(conv(x), (-1, FLAT)),
    "an inner model that flattens": lambda x: inner(
        layers.Input((6, 6, 3)), layers.Conv2D(5, 3), layers.Flatten()
    )(x),
    "an inner model that goes on": lambda x: inner(
        layers.Input((FLAT,)), layers.Dropout(0.1), layers.Activation("linear")
    )(layers.Flatten()(conv(x))),
    "layers that keep the order": lambda x: layers.Identity()(
        layers.Dropout(0.3)(layers.Flatten()(conv(x)))
    ),
    "an activation of keras.ops": lambda x: ops.leaky_relu(layers.Flatten()(conv(x)), 1.0),
}


@pytest.mark.parametrize("kind", BEHIND)
def test_behind_a_flatten(kind: str) -> None:
    def there() -> Any:
        given = keras.Input((6, 6, 3))
        x = layers.BatchNormalization()(BEHIND[kind](given))
        return keras.Model(given, layers.Dense(2)(x))

    here = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.BatchNorm1d(FLAT), nn.Linear(FLAT, 2))
    first, again, x = filled(there()), there(), torch.randn(4, 6, 6, 3)
    assert sn.port.from_keras(first, here, example=x).agreement
    sn.port.to_keras(here, again, example=x)
    assert same(values(first), values(again))


def test_behind_an_inner_model_that_takes_features() -> None:
    given = keras.Input((6, 6, 3))
    head = inner(layers.Input((FLAT,)), layers.Dense(2))
    there = filled(keras.Model(given, head(layers.Flatten()(conv(given)))))
    here = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(FLAT, 2))
    assert sn.port.from_keras(there, here, example=torch.randn(4, 6, 6, 3)).agreement


class Beside(nn.Module):
    """Flattened maps beside features, and their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 5, 3), nn.Conv2d(3, 5, 3)
        self.dense = nn.Linear(FLAT + 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x).flatten(1) + self.other(x).flatten(1)
        return self.dense(torch.cat([x.mean((2, 3)), maps], 1))


def test_side_by_side_and_added() -> None:
    given = keras.Input((6, 6, 3))
    maps = layers.Add()([layers.Flatten()(conv(given)), layers.Flatten()(conv(given))])
    x = layers.Concatenate()([layers.GlobalAveragePooling2D()(given), maps])
    there, here = filled(keras.Model(given, layers.Dense(2)(x))), Beside()
    assert sn.port.from_keras(there, here, example=torch.randn(4, 6, 6, 3)).agreement


def test_calls_in_other_models_do_not_count() -> None:
    given = keras.Input((6, 6, 3))
    maps = keras.Model(given, layers.Flatten()(conv(given)))
    head = filled(inner(layers.Input((FLAT,)), layers.Dense(2)))
    there = filled(keras.Model(given, head(maps(given))))
    body = nn.Conv2d(3, 5, 3)
    here = nn.Sequential(body, nn.Flatten(), nn.Linear(FLAT, 2))
    assert sn.port.from_keras(there, here, example=torch.randn(4, 6, 6, 3)).agreement
    # Alone it takes features as they come.
    assert sn.port.from_keras(head, nn.Linear(FLAT, 2), example=torch.randn(4, FLAT)).agreement


def test_an_order_that_is_not_known_is_said() -> None:
    given = keras.Input((6, 6, 3))
    x = ops.flip(layers.Flatten()(conv(given)), 1)
    there = keras.Model(given, layers.Dense(2, name="head")(x))
    here = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(FLAT, 2))
    with pytest.raises(PortError, match="left out is head: takes a flattened map through flip"):
        sn.port.from_keras(there, here)
    features = keras.Input((FLAT,))
    x = layers.Add(name="sum")([layers.Flatten()(conv(given)), features])
    there = keras.Model([given, features], layers.Dense(2, name="head")(x))
    with pytest.raises(PortError, match="head: takes features in several orders at sum"):
        sn.port.from_keras(there, here)


@pytest.mark.parametrize(
    ("net", "twin", "shape"),
    [
        # As rows of pixels: no axis is the channels'.
        ([layers.Flatten], [], (4, 5)),
        # Tokens: neither framework moves their features.
        ([lambda: layers.Dense(3), layers.Flatten], [nn.Linear(5, 3)], (4, 5)),
        # Keras' Flatten does not move the channels of a map that has them first.
        (
            [lambda: layers.Conv2D(5, 3, data_format="channels_first"), layers.Flatten],
            [nn.Conv2d(3, 5, 3)],
            (3, 6, 6),
        ),
        (
            [lambda: layers.BatchNormalization(axis=1), layers.Flatten],
            [nn.BatchNorm2d(3)],
            (3, 6, 6),
        ),
    ],
)
def test_what_keeps_its_order(
    net: list[Callable[[], Any]], twin: list[nn.Module], shape: tuple[int, ...]
) -> None:
    there = filled(
        keras.Sequential([layers.Input(shape), *(make() for make in net), layers.Dense(2)])
    )
    here = nn.Sequential(*twin, nn.Flatten(), nn.Linear(there.layers[-1].input.shape[1], 2))
    assert sn.port.from_keras(there, here, example=torch.randn(4, *shape)).agreement
