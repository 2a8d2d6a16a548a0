"""A small Keras model on the torch backend, its batches, and its state."""

from __future__ import annotations

from typing import Any

import keras
import torch
from keras import layers

from stillnorm.porting.keras.parts import as_torch


def images(n: int = 16, seed: int = 0) -> torch.Tensor:
    """Return images, (n, 8, 8, 3), with mean 1 and deviation 2."""
    g = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(n, 8, 8, 3, generator=g) + 1


BATCHES = [images(seed=seed) for seed in range(4)]


def make(axis: int = -1, **settings: Any) -> Any:
    """Return a functional model with a model inside it, and norms "bn", "block.bn" and "head"."""
    keras.utils.set_random_seed(0)
    order = "channels_last" if axis == -1 else "channels_first"
    inner = (6, 6, 4) if axis == -1 else (4, 6, 6)
    block = keras.Sequential(
        [
            layers.Input(inner),
            layers.Conv2D(5, 3, data_format=order),
            layers.BatchNormalization(axis, name="bn", **settings),
        ],
        name="block",
    )
    given = keras.Input((8, 8, 3) if axis == -1 else (3, 8, 8))
    x = layers.Conv2D(4, 3, data_format=order)(given)
    x = layers.BatchNormalization(axis, name="bn", **settings)(x)
    x = block(layers.ReLU()(x))
    x = layers.GlobalAveragePooling2D(data_format=order)(x)
    x = layers.BatchNormalization(name="head", **settings)(layers.Dense(6)(x))
    return keras.Model(given, layers.Dense(2)(x))


def trained(axis: int = -1) -> Any:
    """Return it with statistics that fit the batches."""
    model = make(axis, momentum=0.9)
    with torch.no_grad():
        for x in BATCHES * 20:
            model(x if axis == -1 else x.movedim(-1, 1), training=True)
    return model


def state(model: Any) -> list[torch.Tensor]:
    """Return copies of all variables."""
    return [as_torch(variable.value) for variable in model.variables]
