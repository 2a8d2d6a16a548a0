"""Keras models on the torch backend are exported too: as what `training=False` computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import pytest
import torch
from torch import Tensor

from export.nets import exported
from export.test_held_folded_split import run
from stillnorm.errors import ExportError


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 8, 8, 3, generator=torch.Generator().manual_seed(seed))


def make() -> Any:
    given = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3)(given)
    x = keras.layers.BatchNormalization(name="bn")(x)
    x = keras.layers.Dropout(0.5)(x)
    model = keras.Model(given, keras.layers.GlobalAveragePooling2D()(x))
    for _ in range(3):
        model(images(16) + 1, training=True)
    return model


def values(model: Any) -> list[Any]:
    return [(weight.path, weight.numpy().tolist(), weight.trainable) for weight in model.weights]


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_it_is_exported_as_it_predicts(tmp_path: Path, suffix: str) -> None:
    model = make()
    before = values(model)
    report = exported(model, images(2), tmp_path, suffix)
    assert [one.batch_size for one in report.runs] == [2, 1, 3]
    assert [port.name for port in (*report.inputs, *report.outputs)] == ["inputs", "output"]
    x = images(5, 9)
    torch.testing.assert_close(run(report.path, x), model(x, training=False).detach())
    assert values(model) == before


def test_training_true_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="SN007"):
        exported(make(), images(2), tmp_path, ".pt2", forward=lambda m, x: m(x, training=True))


class Subclassed(keras.Model):  # type: ignore[misc]
    """With layers in a list, which Keras wraps in one that refuses to be filled again."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = [keras.layers.BatchNormalization() for _ in range(2)]

    def call(self, x: Any, training: bool = False) -> Any:
        for norm in self.norms:
            x = norm(x, training=training)
        return x


def test_lists_of_a_subclassed_model_stay(tmp_path: Path) -> None:
    model = Subclassed()
    model(images(2))
    norms = list(model.norms)
    exported(model, images(2), tmp_path, ".pt2")
    assert list(model.norms) == norms
