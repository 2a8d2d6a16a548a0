"""Keras models and the torch models that are the same networks, with values in all variables."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import torch
from keras import layers
from torch import Tensor, nn

from stillnorm.porting.keras.parts import read


def filled(model: Any, seed: int = 0) -> Any:
    """Give every variable a value of its own, as training would."""
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        spread = rng.standard_normal(weight.shape) if weight.shape else np.array(0.5)
        value = {
            "gamma": 1 + 0.2 * spread,
            "moving_variance": np.exp(0.5 * spread),
            "kernel": 0.3 * spread,
        }.get(weight.name, 0.3 * spread)
        weight.assign(value.astype("float32"))
    return model


def values(model: Any) -> list[Tensor]:
    return [read(weight) for weight in model.weights]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def image_net(axis: int = -1) -> Any:
    """2-D: every kind of convolution, center and scale off, a flatten, a norm after it."""
    order = "channels_last" if axis == -1 else "channels_first"
    return filled(
        keras.Sequential(
            [
                layers.Input((9, 7, 3) if axis == -1 else (3, 9, 7)),
                layers.Conv2D(6, 3, data_format=order),
                layers.BatchNormalization(axis=axis),
                layers.DepthwiseConv2D(3, depth_multiplier=2, data_format=order),
                layers.BatchNormalization(axis=axis, scale=False, momentum=0.9),
                layers.SeparableConv2D(8, 2, data_format=order),
                layers.BatchNormalization(axis=axis, center=False, epsilon=1e-5),
                layers.Conv2DTranspose(4, 3, strides=2, data_format=order),
                layers.ReLU(),
                layers.Dropout(0.3),
                layers.Flatten(data_format=order),
                layers.BatchNormalization(),
                layers.Dense(5),
            ]
        )
    )


def image_twin() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.Conv2d(6, 12, 3, groups=6),
        nn.BatchNorm2d(12),
        nn.Conv2d(12, 12, 2, groups=12, bias=False),
        nn.Conv2d(12, 8, 1),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 4, 3, stride=2),
        nn.ReLU(inplace=True),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.BatchNorm1d(180),
        nn.Linear(180, 5),
    )


def sequence_net(axis: int = -1) -> Any:
    """1-D: strided, dilated, grouped and transposed convolutions."""
    order = "channels_last" if axis == -1 else "channels_first"
    return filled(
        keras.Sequential(
            [
                layers.Input((24, 4) if axis == -1 else (4, 24)),
                layers.Conv1D(8, 3, strides=2, groups=2, use_bias=False, data_format=order),
                layers.BatchNormalization(axis=axis),
                layers.Conv1D(6, 3, dilation_rate=2, data_format=order),
                layers.BatchNormalization(axis=axis, center=False, scale=False),
                layers.Conv1DTranspose(5, 4, data_format=order),
            ]
        )
    )


def sequence_twin(affine: bool = False) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(4, 8, 3, stride=2, groups=2, bias=False),
        nn.BatchNorm1d(8),
        nn.Conv1d(8, 6, 3, dilation=2),
        nn.BatchNorm1d(6, affine=affine),
        nn.ConvTranspose1d(6, 5, 4),
    )


def volume_net(axis: int = -1) -> Any:
    """3-D."""
    return filled(
        keras.Sequential(
            [
                layers.Input((5, 6, 7, 2)),
                layers.Conv3D(4, (1, 2, 3)),
                layers.BatchNormalization(axis=axis),
                layers.Conv3DTranspose(3, 2),
            ]
        )
    )


def volume_twin() -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(2, 4, (1, 2, 3)), nn.BatchNorm3d(4), nn.ConvTranspose3d(4, 3, 2))


def dense_net(axis: int = -1) -> Any:
    """Features alone."""
    return filled(
        keras.Sequential(
            [
                layers.Input((6,)),
                layers.Dense(10, activation="relu"),
                layers.BatchNormalization(axis=axis),
                layers.Dropout(0.5),
                layers.Dense(3, use_bias=False),
            ]
        )
    )


def dense_twin() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 10), nn.ReLU(), nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 3, False)
    )


def nested_net(axis: int = -1) -> Any:
    """A functional model with a model inside it, and layers of one name in both."""
    given = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(given)
    x = layers.BatchNormalization(name="norm")(x)
    x = layers.ReLU()(x)
    block = keras.Sequential(
        [
            layers.Input((6, 6, 4)),
            layers.Conv2D(4, 3, padding="same", name="conv"),
            layers.BatchNormalization(name="norm"),
        ],
        name="block",
    )
    x = layers.Add()([x, block(x)])
    return filled(keras.Model(given, layers.GlobalAveragePooling2D()(x)))


class NestedTwin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict(
            {"norm": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 4, 3, padding=1)}
        )
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return (x + self.block["norm"](self.block["conv"](x))).mean((2, 3))


PAIRS: dict[str, tuple[Any, Any, Any]] = {
    "2-D": (image_net, image_twin, (6, 9, 7, 3)),
    "2-D, axis=1": (lambda: image_net(1), image_twin, (6, 3, 9, 7)),
    "1-D": (sequence_net, sequence_twin, (6, 24, 4)),
    "1-D, axis=1": (lambda: sequence_net(1), sequence_twin, (6, 4, 24)),
    "1-D, affine in torch alone": (sequence_net, lambda: sequence_twin(True), (6, 24, 4)),
    "3-D": (volume_net, volume_twin, (3, 5, 6, 7, 2)),
    "dense": (dense_net, dense_twin, (16, 6)),
    "nested": (nested_net, NestedTwin, (4, 8, 8, 3)),
}


# ------------------------------------------------------------------------------- ResNet50


class Block(nn.Module):
    """A bottleneck block of the first ResNet: its stride is in the first 1x1 convolution."""

    def __init__(self, channels: int, inner: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        out, eps = 4 * inner, 1.001e-5
        if shortcut:
            self.add_module("0_conv", nn.Conv2d(channels, out, 1, stride))
            self.add_module("0_bn", nn.BatchNorm2d(out, eps))
        self.add_module("1_conv", nn.Conv2d(channels, inner, 1, stride))
        self.add_module("1_bn", nn.BatchNorm2d(inner, eps))
        self.add_module("2_conv", nn.Conv2d(inner, inner, 3, padding=1))
        self.add_module("2_bn", nn.BatchNorm2d(inner, eps))
        self.add_module("3_conv", nn.Conv2d(inner, out, 1))
        self.add_module("3_bn", nn.BatchNorm2d(out, eps))

    def forward(self, x: Tensor) -> Tensor:
        a = dict(self.named_children())
        skip = a["0_bn"](a["0_conv"](x)) if "0_conv" in a else x
        x = a["1_bn"](a["1_conv"](x)).relu()
        x = a["2_bn"](a["2_conv"](x)).relu()
        return (a["3_bn"](a["3_conv"](x)) + skip).relu()


class ResNet50(nn.Module):
    """`keras.applications.ResNet50`: biases in convolutions, zero padding before the first pool."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1_conv = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        self.conv1_bn = nn.BatchNorm2d(64)
        self.pool = nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3, 2))
        self.blocks: list[str] = []
        channels = 64
        for stage, (inner, blocks) in enumerate([(64, 3), (128, 4), (256, 6), (512, 3)], start=2):
            for i in range(1, blocks + 1):
                stride = 2 if stage > 2 and i == 1 else 1
                self.blocks.append(f"conv{stage}_block{i}")
                self.add_module(self.blocks[-1], Block(channels, inner, stride, i == 1))
                channels = 4 * inner
        self.predictions = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.conv1_bn(self.conv1_conv(x)).relu())
        for name in self.blocks:
            x = getattr(self, name)(x)
        return self.predictions(x.mean((2, 3)))


def calibrated_resnet50(x: Tensor, classes: int) -> Any:
    """Return Keras' ResNet50 with random weights and the statistics of a batch."""
    model = keras.applications.ResNet50(
        weights=None, input_shape=tuple(x.shape[1:]), classes=classes, classifier_activation=None
    )
    norms = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    for norm in norms:
        norm.momentum = 0.0
    model(keras.ops.convert_to_tensor(x.numpy()), training=True)
    for norm in norms:
        norm.momentum = 0.99
    return model
