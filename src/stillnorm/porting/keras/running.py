"""Running a Keras model to look at it: torch tensors in and out, and nothing left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import torch
from keras import layers
from torch import Tensor

from stillnorm.porting.keras.parts import all_layers, as_torch, assign, read

_DROPOUT = (
    layers.AlphaDropout,
    layers.Dropout,
    layers.GaussianDropout,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
)


@contextlib.contextmanager
def left_as_found(model: Any) -> Iterator[None]:
    """Switch dropout off inside the block; afterwards put back every variable that changed."""
    variables = list(model.variables)
    before = [read(variable) for variable in variables]
    rates = [(layer, layer.rate) for _, layer in all_layers(model) if isinstance(layer, _DROPOUT)]
    try:
        for layer, _ in rates:
            layer.rate = 0
        yield
    finally:
        for layer, rate in rates:
            layer.rate = rate
        for variable, value in zip(variables, before, strict=True):
            if not torch.equal(read(variable), value):
                assign(variable, value)


def random_layer(model: Any) -> str | None:
    """Name a layer that draws random numbers in train mode, past the dropouts; None for none."""
    for name, layer in all_layers(model):
        draws = hasattr(layer, "seed_generator") or isinstance(layer, layers.GaussianNoise)
        if draws and not isinstance(layer, _DROPOUT):
            return f"{name}, a {type(layer).__name__}"
    return None


def run(model: Any, inputs: Any, *, training: bool) -> list[Tensor]:
    """Call the model on tensors or arrays, alone, in a tuple or in a mapping; return its outputs.

    No memory is shared: JAX takes over the arrays that it is given.
    """
    taken = keras.tree.map_structure(
        lambda value: keras.ops.convert_to_tensor(as_torch(value).numpy()), inputs
    )
    return [as_torch(output) for output in keras.tree.flatten(model(taken, training=training))]
