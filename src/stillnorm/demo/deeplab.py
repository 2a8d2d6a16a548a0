"""DeepLab-v2 in small: a ResNet whose last stages are dilated, and ASPP.

As in the paper the last two stages keep their resolution and dilate by 2 and 4 instead, and ASPP is
a sum of dilated convolutions that end in the class scores, without a norm and without image pooling
(those came with v3). One block per stage, a narrow stem without max pooling, and ASPP's rates
scaled to a map of 12 x 12 make it small enough to train in a demo.

Source: Chen et al. 2017, "DeepLab: Semantic Image Segmentation with Deep Convolutional Nets, Atrous
Convolution, and Fully Connected CRFs", section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RATES = (1, 2, 4, 6)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride, dilation)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs, 1, dilation)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(shortcut + residual)."""
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class DeepLabV2(nn.Module):
    """The network: 12 norm layers.

    Shape:
        - x: ``(N, 3, H, W)``
        - returns: ``(N, classes, H, W)``
    """

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.conv1 = _conv3x3(3, width, 2, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = BasicBlock(width, width)
        self.layer2 = BasicBlock(width, 2 * width, stride=2)
        self.layer3 = BasicBlock(2 * width, 3 * width, dilation=2)
        self.layer4 = BasicBlock(3 * width, 4 * width, dilation=4)
        self.aspp = nn.ModuleList(
            nn.Conv2d(4 * width, classes, 3, padding=rate, dilation=rate) for rate in RATES
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores of every pixel."""
        features = F.relu(self.bn1(self.conv1(x)))
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            features = layer(features)
        scores = torch.stack([head(features) for head in self.aspp]).sum(0)
        return F.interpolate(scores, size=x.shape[2:], mode="bilinear", align_corners=False)


def _conv3x3(inputs: int, outputs: int, stride: int, dilation: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, bias=False)
