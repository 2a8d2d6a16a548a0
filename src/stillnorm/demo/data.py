"""The demo's data: handwritten digits and two photographs, which scikit-learn ships.

The segmentation task is made of both: stickers with a digit on crops of a photograph, eleven
classes (the photograph and the ten digits). Its two domains are the two photographs, one with
light digits on dark stickers, the other with dark digits on light ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

DIGITS = 1797  # in the data set
TRAIN = 1437  # four fifths of them

SIDE = 48  # pixels of a scene
STICKERS = 3  # in three of its four quarters
CLASSES = 11


@dataclass(frozen=True, eq=False)
class Labelled:
    """Inputs and their labels.

    Args:
        x: The inputs.
        y: The labels.

    Shape:
        - x: ``(n, ...)``
        - y: ``(n,)``, or ``(n, height, width)`` for segmentation
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Cut into batches, in order; the last may be smaller."""
        return list(zip(torch.split(self.x, size), torch.split(self.y, size), strict=True))

    def shuffled(self, size: int, steps: int, seed: int) -> list[Tensor]:
        """Return the indices of `steps` batches, epoch after epoch, each in a new order."""
        g = torch.Generator().manual_seed(seed)
        epochs: list[Tensor] = []
        while len(epochs) < steps:
            epochs += torch.split(torch.randperm(len(self), generator=g), size)
        return epochs[:steps]


@cache
def _digits() -> tuple[Tensor, Tensor]:
    """Return all digits, (1797, 1, 8, 8) in 0 .. 1, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images / 16, dtype=torch.float32)[:, None], torch.tensor(data.target)


def digits(seed: int) -> tuple[Labelled, Labelled]:
    """Return the digits divided into training and test set.

    Shape:
        - x: ``(n, 1, 8, 8)``, in 0 .. 1
    """
    x, y = _digits()
    order = torch.randperm(DIGITS, generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAIN], order[TRAIN:]
    return Labelled(x[train], y[train]), Labelled(x[test], y[test])


def as_photographs(data: Labelled) -> Labelled:
    """Enlarge digits to the shape of CIFAR's photographs, (n, 3, 32, 32)."""
    x = F.interpolate(data.x, size=(32, 32), mode="bilinear", align_corners=False)
    return Labelled(x.expand(-1, 3, -1, -1).contiguous(), data.y)


Photograph = Literal["china.jpg", "flower.jpg"]


@cache
def _photograph(name: Photograph) -> Tensor:
    """Return a photograph at half its size, (3, 213, 320) in 0 .. 1."""
    from sklearn.datasets import load_sample_image

    image = torch.tensor(load_sample_image(name) / 255, dtype=torch.float32)
    return F.avg_pool2d(image.permute(2, 0, 1), 2)


def scenes(
    name: Photograph,
    digits: Labelled,
    n: int,
    *,
    columns: tuple[float, float],
    negative: bool,
    seed: int,
) -> Labelled:
    """Paste stickers with digits on crops of a photograph.

    Args:
        name: Which photograph.
        digits: What to write on the stickers.
        n: How many scenes.
        columns: The part of the photograph that crops begin in, from 0 (left) to 1 (right).
        negative: Dark digits on light stickers instead of light on dark.
        seed: Of the random choices.

    Shape:
        - x: ``(n, 3, 48, 48)``, roughly standardised
        - y: ``(n, 48, 48)``; 0 is the photograph, d + 1 the digit d
    """
    g = torch.Generator().manual_seed(seed)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=g))

    photograph = _photograph(name)
    height, width = (extent - SIDE for extent in photograph.shape[1:])
    x, y = torch.empty(n, 3, SIDE, SIDE), torch.zeros(n, SIDE, SIDE, dtype=torch.long)
    for scene, label in zip(x, y, strict=True):
        top, left = pick(0, height), pick(*(int(edge * width) for edge in columns))
        scene.copy_(photograph[:, top : top + SIDE, left : left + SIDE])
        for quarter in torch.randperm(4, generator=g)[:STICKERS].tolist():
            which, side = pick(0, len(digits) - 1), pick(SIDE // 2 - 6, SIDE // 2 - 2)
            slack = SIDE // 2 - side
            row = pick(0, slack) + quarter // 2 * SIDE // 2
            column = pick(0, slack) + quarter % 2 * SIDE // 2
            area = slice(row, row + side), slice(column, column + side)
            ink = F.interpolate(digits.x[which, None], size=(side, side), mode="bilinear")[0]
            dark = 0.3 * torch.rand(3, 1, 1, generator=g)
            scene[:, *area] = dark + 0.7 * ((1 - ink) if negative else ink)
            label[area] = digits.y[which] + 1
    return Labelled((x - 0.45) / 0.25, y)
