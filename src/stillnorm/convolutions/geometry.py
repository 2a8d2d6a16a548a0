"""The geometry of a convolution: everything about it that is not a tensor."""

from __future__ import annotations

import math
from typing import NamedTuple


class Geometry(NamedTuple):
    """The arguments of `torch.convolution` after input, weight and bias, in its order.

    Args:
        stride: Per dimension.
        padding: Zeros on both sides, per dimension.
        dilation: Per dimension.
        transposed: Whether it is a transposed convolution.
        output_padding: Of a transposed convolution, per dimension; else zeros.
        groups: The number of groups.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool
    output_padding: tuple[int, ...]
    groups: int

    def out_channels(self, weight: tuple[int, ...]) -> int:
        """Return the number of output channels for a weight of that shape."""
        return weight[1] * self.groups if self.transposed else weight[0]

    def in_channels(self, weight: tuple[int, ...]) -> int:
        """Return the number of input channels for a weight of that shape."""
        return weight[0] if self.transposed else weight[1] * self.groups

    def output_shape(self, x: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the output for an input and a weight of these shapes.

        Example:
            >>> plain = Geometry((2, 2), (1, 1), (1, 1), False, (0, 0), 1)
            >>> plain.output_shape((8, 3, 32, 32), (16, 3, 3, 3))
            (8, 16, 16, 16)
        """
        sizes = []
        for i, (n, kernel) in enumerate(zip(x[2:], weight[2:], strict=True)):
            reach = self.dilation[i] * (kernel - 1)
            if self.transposed:
                size = (n - 1) * self.stride[i] - 2 * self.padding[i] + reach
                sizes.append(size + self.output_padding[i] + 1)
            else:
                sizes.append((n + 2 * self.padding[i] - reach - 1) // self.stride[i] + 1)
        return (x[0], self.out_channels(weight), *sizes)

    def multiplications(self, weight: tuple[int, ...]) -> int:
        """Return how often a value of the output is a product of two: (C_in / groups) k^d."""
        per_output = weight[0] // self.groups if self.transposed else weight[1]
        return per_output * math.prod(weight[2:])
