"""What `check` was given, and which rules that is enough for."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from stillnorm.diagnosis.evidence.peers import Peers
from stillnorm.diagnosis.files.skeleton import Stored
from stillnorm.errors import BatchError, CallError
from stillnorm.tracing import Forward, tensors_in

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
    "group": "needs group=",
}
_TAKES = {
    "score": ("output, batch",),
    "predict": ("model, batch",),
    "train_step": ("model, batch", "model, batch, optimizer"),
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
        file: The file that was given in place of a model; `model` is the tree of its norm layers.
        peers: What the ranks of a process group hold.
    """

    model: nn.Module
    batches: object = None
    forward: Forward | None = None
    score: Score | None = None
    predict: Predict | None = None
    train_step: TrainStep | None = None
    optimizer: Optimizer | None = None
    restore: tuple[Any, ...] = ()
    file: Stored | None = None
    peers: Peers | None = None

    def __post_init__(self) -> None:
        functions = (self.forward, self.score, self.predict, self.train_step)
        if self.file is not None and any(x is not None for x in (self.batches, *functions)):
            raise BatchError(
                f"{self.file.name} is no model that could be run: {self.file.kind}",
                help="check(model, batches) with the model itself; on the command line "
                "net.py:make --weights FILE",
            )
        for name, takes in _TAKES.items():
            _check_function(name, getattr(self, name), takes)
        if self.batches is not None:
            return
        for name in ("score", "predict", "train_step"):
            if getattr(self, name) is not None:
                raise BatchError(
                    f"{name}= needs batches", help=f"check(model, batches, {name}=...)"
                )

    def rate(self, output: object, batch: object) -> float:
        """Return the user's score of an output.

        NaN of an output that has NaN itself is a fact about the model, and stays.

        Raises:
            CallError: The score is no number.
        """
        assert self.score is not None  # noqa: S101 - asked for where there is one
        value = self.score(output, batch)
        number = _number(value)
        if number is None:
            raise CallError(
                f"score returned {_described(value)}, not a number",
                help="return one number for the batch, higher is better: "
                "(output.argmax(1) == batch[1]).float().mean()",
            )
        if math.isnan(number) and all(bool(x.isfinite().all()) for x in tensors_in(output)):
            raise CallError(
                "score returned NaN for an output without NaN",
                help="return one number for every batch, higher is better, also for the last",
            )
        return number

    def lacks(self, needs: tuple[Need, ...]) -> str:
        """Say what is missing of what a rule needs: "needs batches"; nothing when it can run."""
        if self.file is not None and not {"state", "checkpoint"}.issuperset(needs):
            return _MISSING["tree"]
        if self.file is not None and "state" in needs and not self.file.has_values:
            return "no values: the tensors are on the meta device"
        given = {
            "state": True,
            "tree": True,
            "forward": self.batches is not None,
            "score": self.score is not None,
            "predict": self.predict is not None,
            "step": self.train_step is not None,
            "optimizer": self.optimizer is not None,
            "checkpoint": self.file is not None,
            "group": self.peers is not None,
        }
        return next((_MISSING[need] for need in needs if not given[need]), "")


def _check_function(name: str, function: object, takes: tuple[str, ...]) -> None:
    """Raise when a function that `check` was given cannot be called as `check` calls it."""
    if function is None:
        return
    help = f"def {name}({takes[0]}): ..."
    if not callable(function):
        raise CallError(f"{name}= is a {type(function).__name__}, not a function", help=help)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return
    if not any(_binds(signature, len(names.split(", "))) for names in takes):
        raise CallError(f"{name}= takes {signature} and is called with ({takes[0]})", help=help)


def _binds(signature: inspect.Signature, arguments: int) -> bool:
    try:
        signature.bind(*range(arguments))
    except TypeError:
        return False
    return True


def _number(value: object) -> float | None:
    """Return a value as a number: of Python, NumPy, or a tensor with one element."""
    if isinstance(value, str | bytes):
        return None
    try:
        return float(value.item() if hasattr(value, "item") else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return None


def _described(value: object) -> str:
    if value is None:
        return "None"
    shape = f" {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"
