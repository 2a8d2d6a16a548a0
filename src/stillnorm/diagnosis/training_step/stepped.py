"""What was seen of one training step: plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from stillnorm.norms import NormalizesBy, NormLayer, same_bits
from stillnorm.tracing import Site

if TYPE_CHECKING:
    from torch.autograd.graph import Node

Statistics = tuple[Tensor | None, Tensor | None]  # mean and variance
Gradient = Literal["used", "dropped", "input", "none"]


@dataclass(eq=False)
class StepCall:
    """One call of one norm layer within the step.

    Args:
        layer: The layer.
        forward: Which forward of the model it belongs to, from 0: which call from outside of a
            module of the model.
        site: The user's line that called the layer, if any.
        training: The flag of the layer.
        parents: The flags of the modules above it, from the root.
        grad: Whether gradients were on.
        in_backward: Whether it ran inside a backward, as the recomputation of a checkpoint does.
        steps: How many optimizer steps had been taken.
        displaced: Whether the weights were others than before and after, without an optimizer step:
            SAM's second forward.
        before: The layer's statistics before the call, (C,) each.
        shape: The input's shape, (N, C, *).
        used: The statistics that the forward really used.
        moments: Mean and variance of the input, (C,) each; None where they cannot be computed.
        moved: Whether the call moved the layer's statistics, and nothing took that back.
        gradient: What became of the gradient that went through the call: an optimizer step
            "used" it (or none has been taken yet), it was "dropped" before one, it was taken of an
            "input" only, or there was "none".
        is_recomputed: Whether a backward repeated it.
        backwards: The backwards that went through it.
        node: Where it is in the graph, while the step runs.
    """

    layer: NormLayer
    forward: int
    site: Site | None
    training: bool
    parents: tuple[bool, ...]
    grad: bool
    in_backward: bool
    steps: int
    displaced: bool
    before: Statistics
    shape: tuple[int, ...] = ()
    used: NormalizesBy = "running"
    moments: tuple[Tensor, Tensor] | None = None
    moved: bool = False
    gradient: Gradient = "none"
    is_recomputed: bool = False
    backwards: list[Backward] = field(default_factory=list)
    node: Node | None = None


@dataclass(eq=False)
class Backward:
    """One backward.

    Args:
        of_parameters: Whether it computes gradients of parameters, or of inputs only.
        steps: How many optimizer steps had been taken.
        cleared: The layers whose own gradients had been dropped since the last backward.
    """

    of_parameters: bool
    steps: int
    cleared: frozenset[NormLayer]


@dataclass(frozen=True, eq=False)
class FrozenMove:
    """An affine parameter that an optimizer moved although its `requires_grad` was False.

    Args:
        layer: The layer.
        name: ``"weight"`` or ``"bias"``.
        by: How far the channel that moved most did.
        had_gradient: Whether it had a `.grad`.
    """

    layer: NormLayer
    name: str
    by: float
    had_gradient: bool


@dataclass(frozen=True, eq=False)
class Step:
    """What one step did.

    Args:
        calls: The calls of norm layers, in order.
        steps: The number of optimizer steps; one that runs inside another is part of it.
        backwards: The number of backwards.
        trained: The parameters that the step trains: with a gradient and a learning rate in an
            optimizer that stepped, or moved without one; and those of known optimizers that did not
            step this time.
        unheld: The parameters that no known optimizer holds.
        before: The statistics of each layer before.
        after: The statistics of each layer after.
        frozen_moves: Affine parameters that moved although frozen.
        coupled: The layers with batch statistics through which gradients of an input were taken,
            with a graph.
        told_eval: Whether the step itself put the model in eval mode.
        updates: The most optimizer steps that any trained parameter had had before; None where no
            optimizer counts them.
    """

    calls: tuple[StepCall, ...]
    steps: int
    backwards: int
    trained: frozenset[nn.Parameter]
    unheld: frozenset[nn.Parameter]
    before: dict[NormLayer, Statistics]
    after: dict[NormLayer, Statistics]
    frozen_moves: tuple[FrozenMove, ...]
    coupled: tuple[NormLayer, ...]
    told_eval: bool
    updates: int | None

    def of(self, layer: NormLayer) -> tuple[StepCall, ...]:
        """Return the calls of one layer, in order."""
        return tuple(call for call in self.calls if call.layer is layer)

    def shift(self, layer: NormLayer) -> float:
        """Return how far the running mean moved, in deviations, root mean square over channels."""
        (mean, var), (now, _) = self.before[layer], self.after[layer]
        if mean is None or var is None or now is None:
            return 0.0
        deviation = (var.double() + layer.eps).sqrt()
        return float(((now.double() - mean.double()) / deviation).square().mean().sqrt())

    def trains(self, module: nn.Module, recurse: bool = False) -> bool:
        """Tell whether the step trains a parameter of the module."""
        return any(parameter in self.trained for parameter in module.parameters(recurse))

    @staticmethod
    def where(calls: Sequence[StepCall]) -> tuple[str, ...]:
        """Return the source lines of calls, each once."""
        return tuple(dict.fromkeys(str(call.site) for call in calls if call.site))


def statistics(layer: NormLayer) -> Statistics:
    """Copy a layer's running mean and variance."""
    mean, var = layer.running_mean, layer.running_var
    return (
        None if mean is None else mean.detach().clone(),
        None if var is None else var.detach().clone(),
    )


def same_statistics(a: Statistics, b: Statistics) -> bool:
    """Tell whether two pairs of statistics have the same bits."""
    return all(
        x is y if x is None or y is None else same_bits(x, y) for x, y in zip(a, b, strict=True)
    )
