"""What optimizers do during a step: how often they step, what they train, what they should not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from stillnorm.diagnosis.training_step.stepped import FrozenMove
from stillnorm.norms import NormLayer


class Optimizing:
    """The optimizer steps, of whatever optimizer.

    Args:
        layers: The norm layers.
        before: Called with each optimizer before it steps.
    """

    def __init__(
        self, layers: Collection[NormLayer], before: Callable[[Optimizer], object]
    ) -> None:
        self.steps = 0
        self.updates: list[int] = []
        self.frozen_moves: dict[tuple[NormLayer, str], FrozenMove] = {}
        self._layers = layers
        self._before = before
        self._depth = 0
        self._stepped: set[Optimizer] = set()
        self._trained: set[Tensor] = set()
        self._frozen: dict[tuple[NormLayer, str], tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note while the block runs."""
        handles = (
            register_optimizer_step_pre_hook(self._enter),
            register_optimizer_step_post_hook(self._leave),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._before(optimizer)
        if self._depth == 0:
            self._frozen = {
                (layer, name): (parameter, parameter.detach().clone())
                for layer in self._layers
                for name in ("weight", "bias")
                if (parameter := getattr(layer, name)) is not None and not parameter.requires_grad
            }
        self._depth += 1
        self._stepped.add(optimizer)
        self.updates += _counts(optimizer)
        self._note_trained(optimizer)

    def _leave(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._note_trained(optimizer)  # the gradients may be of a closure's
        self._depth -= 1
        if self._depth:  # inside another's step (Lookahead, SAM): part of it
            return
        self.steps += 1
        with torch._C.DisableTorchFunction():
            for (layer, name), (parameter, before) in self._frozen.items():
                by = float((parameter.detach() - before).abs().max()) if before.numel() else 0.0
                if by != 0:
                    move = FrozenMove(layer, name, by, parameter.grad is not None)
                    self.frozen_moves.setdefault((layer, name), move)

    def _note_trained(self, optimizer: Optimizer) -> None:
        learning = (p for p in _learning(optimizer) if p.requires_grad)
        self._trained |= {p for p in learning if p.grad is not None}

    def held(self, known: Iterable[Optimizer]) -> set[Tensor]:
        """Return what the optimizers hold that stepped, or are known."""
        optimizers = self._stepped.union(known)
        return {p for o in optimizers for group in o.param_groups for p in group["params"]}

    def trained(self, known: Iterable[Optimizer]) -> set[Tensor]:
        """Return what was trained, and what known optimizers would train that did not step."""
        idle = set(known) - self._stepped
        waiting = {p for optimizer in idle for p in _learning(optimizer) if p.requires_grad}
        return self._trained | waiting


def _learning(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer holds with a learning rate other than 0."""
    groups = (g for g in optimizer.param_groups if g.get("lr") is None or float(g["lr"]) != 0)
    return [p for group in groups for p in group["params"]]


def _counts(optimizer: Optimizer) -> list[int]:
    """Return how many steps the optimizer has counted so far."""
    states = (state for state in optimizer.state.values() if isinstance(state, dict))
    counts = (state.get("step") for state in states)
    return [int(count) for count in counts if isinstance(count, int | float | Tensor)]
