"""Modules that make faults of norms, or go around and behind a real architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Call = Callable[[nn.Module, Any], Any]


class Called(nn.Module):
    """An architecture that takes a tensor and returns one."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.model, x)


class Ending(Called):
    """An architecture, and layers behind it."""

    def __init__(self, model: nn.Module, call: Call, *layers: nn.Module) -> None:
        super().__init__(model, call)
        self.ending = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.ending(super().forward(x))


class Captions(Called):
    """Features of an architecture, decoded into five words, each (N, 12)."""

    def __init__(self, model: nn.Module, call: Call, features: int) -> None:
        super().__init__(model, call)
        self.decoder = nn.GRU(features, 12, batch_first=True)
        self.norm = nn.BatchNorm1d(5)
        self.words = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = super().forward(x).unsqueeze(1).expand(-1, 5, -1)
        return self.words(self.norm(self.decoder(features)[0]))


class Leaking(Called):
    """An architecture, and beside it what all samples of the batch have in common."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__(model, call)
        self.mates = nn.BatchNorm1d(1, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        level = x.flatten(1).mean(1, keepdim=True)
        level = level / LEVEL
        return level - self.mates(level) + 1e-3 * super().forward(x).mean(1, keepdim=True)


LEVEL = 0.5


class Hidden(nn.Module):
    """A norm in a plain list, where no `eval()` finds it."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norms = [norm]

    def forward(self, x: Tensor) -> Tensor:
        return self.norms[0](x)


def stubborn(norm: nn.Module) -> nn.Module:
    """Make a norm's class one with a `train()` that does nothing."""
    kind = type(norm)
    norm.__class__ = type(
        f"Stubborn{kind.__name__}", (kind,), {"train": lambda self, mode=True: self}
    )
    return norm


def with_activation(norm: nn.Module) -> nn.Module:
    """Make a norm's class a subclass of batch norm that applies an activation inside."""
    kind = type(norm)

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.activation(kind.forward(self, x))

    norm.__class__ = type(f"{kind.__name__}ThenSiLU", (kind,), {"forward": forward})
    norm.activation = nn.SiLU()
    return norm


class FrozenBatchNorm2d(nn.Module):
    """As it was first published: four buffers, and no eps added."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * self.running_var.rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]
