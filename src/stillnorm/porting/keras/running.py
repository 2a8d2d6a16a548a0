"""Running a Keras model to look at it: torch tensors in and out, and nothing left behind."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import keras
import torch
from keras import layers

from stillnorm.norms import same_bits
from stillnorm.norms.undo import undisturbed
from stillnorm.porting.keras.parts import all_layers, as_torch, assign, read
from stillnorm.porting.part import a
from stillnorm.porting.rounding import FLOAT32, of_dtype

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
    before = [(variable, read(variable)) for variable in model.variables]
    rates = [(layer, layer.rate) for _, layer in all_layers(model) if isinstance(layer, _DROPOUT)]

    try:
        for layer, _ in rates:
            layer.rate = 0
        yield
    finally:
        with undisturbed():
            for layer, rate in rates:
                layer.rate = rate
            for variable, value in before:
                if not same_bits(read(variable), value):
                    assign(variable, value)


def dropout_rates(model: Any) -> list[float]:
    """Return the rates of the dropouts that drop something, in the model's order."""
    dropouts = (layer for _, layer in all_layers(model) if isinstance(layer, _DROPOUT))
    return [layer.rate for layer in dropouts if layer.rate]


def random_layer(model: Any) -> str | None:
    """Name a layer that draws random numbers in train mode, past the dropouts; None for none."""
    for name, layer in all_layers(model):
        draws = any(isinstance(it, keras.random.SeedGenerator) for it in vars(layer).values())
        if draws and not isinstance(layer, _DROPOUT):
            return f"{name}, {a(type(layer).__name__)}"
    return None


def run(model: Any, inputs: Any, *, training: bool) -> Any:
    """Call the model on tensors or arrays, alone, in a tuple or in a mapping.

    What comes out is torch's, in the same structure. No memory is shared: JAX takes over the arrays
    that it is given.
    """
    output = model(keras.tree.map_structure(_given, inputs), training=training)
    return keras.tree.map_structure(as_torch, output)


def inputs_of(example: Any) -> list[torch.Tensor]:
    """Return the inputs in an example, flat, as tensors of torch."""
    return [as_torch(value) for value in keras.tree.flatten(example)]


def cause(error: Exception) -> str:
    """Return the sentence of Keras' many that says what is wrong."""
    text = re.sub(r"\x1b\[\d*m", "", str(error))
    text = text.rpartition("Exception encountered: ")[2]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = next((line for line in lines if not line.startswith("Exception encountered")), "")
    return told.partition(". ")[0][:200] or type(error).__name__


def _given(value: Any) -> Any:
    value = as_torch(value)
    # NumPy has no bfloat16; Keras casts to the layers' dtype itself.
    value = value.float() if value.dtype == torch.bfloat16 else value
    return keras.ops.convert_to_tensor(value.numpy())


def precision_of(model: Any) -> float:
    """Return the coarsest precision that a model computes in."""
    cpu = all("cpu" in str(getattr(v.value, "device", "cpu")).lower() for v in model.variables)
    names = {str(layer.compute_dtype) for _, layer in all_layers(model)}
    dtypes = [getattr(torch, name) for name in names if keras.backend.is_float_dtype(name)]
    eps = [of_dtype(dtype, accelerated=not cpu) for dtype in dtypes]
    return max(eps, default=FLOAT32)
