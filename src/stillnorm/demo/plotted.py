"""The network of the tutorial that thread 001 quotes: deep, narrow, with or without BatchNorm.

It keeps its norms beside each layer by name (``setattr(self, 'bn%i' % i, bn)``) and returns what
enters every layer, so that a training loop can plot it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stillnorm.demo.data import Labelled

HIDDEN = 8
WIDTH = 32
BIAS = -0.2


class PlottedNet(nn.Module):
    """Eight hidden layers of tanh on digits.

    Args:
        momentum: Of the norms; None for a network without them.

    Shape:
        - x: ``(N, 1, 8, 8)``
    """

    def __init__(self, momentum: float | None) -> None:
        super().__init__()
        self.do_bn = momentum is not None
        for i in range(HIDDEN):
            fc = nn.Linear(WIDTH if i else 64, WIDTH)
            nn.init.normal_(fc.weight, 0.0, 0.1)
            nn.init.constant_(fc.bias, BIAS)
            setattr(self, f"fc{i}", fc)
            if momentum is not None:
                setattr(self, f"bn{i}", nn.BatchNorm1d(WIDTH, momentum=momentum))
        self.predict = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the class scores and the inputs of the hidden layers and of the last."""
        x = x.flatten(1)
        layer_inputs = [x]
        for i in range(HIDDEN):
            x = self.get_submodule(f"fc{i}")(x)
            if self.do_bn:
                x = self.get_submodule(f"bn{i}")(x)
            x = torch.tanh(x)
            layer_inputs.append(x)
        return self.predict(x), layer_inputs


@torch.no_grad()
def layer_inputs(net: nn.Module, data: Labelled) -> list[Tensor]:
    """Return what enters each layer, in the present modes."""
    inputs: list[Tensor] = net(data.x)[1]
    return inputs
