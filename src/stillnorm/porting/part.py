"""What a layer with weights is, in either framework, so that two of them can be compared."""

from __future__ import annotations

from dataclasses import dataclass


class Refusal(Exception):
    """Raised where one layer cannot be ported; says why."""


def a(kind: str) -> str:
    """Return the name of a class with its article."""
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


@dataclass(frozen=True)
class Geometry:
    """What a port does not change, and two layers must have in common.

    Args:
        kind: "batch norm", "convolution", "transposed convolution" or "dense layer".
        weight: The weight's shape, in torch's layout; (C,) of a batch norm.
        bias: Whether there is a bias; of a batch norm always True.
        stride: The stride along each spatial axis.
        dilation: The dilation along each.
        groups: The number of groups.
    """

    kind: str
    weight: tuple[int, ...]
    bias: bool = True
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __str__(self) -> str:
        size = "x".join(map(str, self.weight[2:]))
        text = f"{self.kind} {size}".rstrip() + f" {self._channels}"
        for name in ("stride", "dilation"):
            steps: tuple[int, ...] = getattr(self, name)
            if any(step != 1 for step in steps):
                text += f", {name} {'x'.join(map(str, steps))}"
        if self.groups != 1:
            text += f", {self.groups} groups"
        return text if self.bias else f"{text}, no bias"

    @property
    def _channels(self) -> str:
        if self.kind == "batch norm":
            return f"of {self.weight[0]}"
        out, into = self.weight[0], self.weight[1]
        if self.kind == "transposed convolution":
            return f"{out} -> {into * self.groups}"
        return f"{into * self.groups} -> {out}"
