"""What `check` was given, and which rules that is enough for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

from stillnorm.errors import BatchError
from stillnorm.tracing import Forward

Need = Literal[
    "state", "tree", "forward", "score", "predict", "step", "optimizer", "checkpoint", "group"
]
Score = Callable[[Any, Any], float]
Predict = Callable[[nn.Module, Any], Any]
TrainStep = Callable[..., Any]

_MISSING: dict[Need, str] = {
    "tree": "needs a model",
    "forward": "needs batches",
    "score": "needs score=",
    "predict": "needs predict=",
    "step": "needs train_step=",
    "optimizer": "needs optimizer=",
    "checkpoint": "needs a checkpoint file",
    "group": "needs a process group",
}


@dataclass(frozen=True, eq=False)
class Request:
    """The arguments of `check`.

    Args:
        model: The model.
        batches: The batches as they were given; None for none.
        forward: ``(model, batch) -> output``.
        score: ``(output, batch) -> number``, higher is better.
        predict: ``(model, batch) -> output``, as the user infers.
        train_step: ``(model, batch)`` or ``(model, batch, optimizer)``, one step of training.
        optimizer: What the step steps.
        restore: What else a step changes and has a `state_dict`.
    """

    model: nn.Module
    batches: object = None
    forward: Forward | None = None
    score: Score | None = None
    predict: Predict | None = None
    train_step: TrainStep | None = None
    optimizer: Optimizer | None = None
    restore: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        if self.batches is not None:
            return
        for name in ("score", "predict", "train_step"):
            if getattr(self, name) is not None:
                raise BatchError(
                    f"{name}= needs batches", help=f"check(model, batches, {name}=...)"
                )

    def lacks(self, needs: tuple[Need, ...]) -> str:
        """Say what is missing of what a rule needs: "needs batches"; nothing when it can run."""
        given = {
            "state": True,
            "tree": True,
            "forward": self.batches is not None,
            "score": self.score is not None,
            "predict": self.predict is not None,
            "step": self.train_step is not None,
            "optimizer": self.optimizer is not None,
            "checkpoint": False,
            "group": torch.distributed.is_available() and torch.distributed.is_initialized(),
        }
        return next((_MISSING[need] for need in needs if not given[need]), "")
