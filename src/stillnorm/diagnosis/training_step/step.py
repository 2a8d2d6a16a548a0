"""Running one step of the user's training under instruments.

The step runs in place, on the first batch and in the model's modes as found: what it closes over
are the objects themselves, so that a copy of model and optimizer would train beside the point.
Everything that can be reached is put back afterwards, and so is every optimizer that steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection

import torch
from torch.optim import Optimizer

from stillnorm.diagnosis.evidence.request import Request, TrainStep
from stillnorm.diagnosis.training_step.recorder import Recorder
from stillnorm.diagnosis.training_step.stepped import Step as Step
from stillnorm.diagnosis.training_step.stepped import StepCall as StepCall
from stillnorm.errors import CallError
from stillnorm.norms import NormLayer
from stillnorm.state import put_back
from stillnorm.tracing import copied, eager, first_line


def run_step(request: Request, batch: object, layers: Collection[NormLayer]) -> Step:
    """Run the user's `train_step` once on a batch, and put everything back.

    Raises:
        CallError: It raised, or it takes an optimizer and `check` was given none.

    Mutates:
        Nothing that can be reached from model, optimizer and `restore`, nor the optimizers that
        step: see `put_back`.

    Cost:
        One step, and one copy of weights, gradients and the optimizers' state.
    """
    assert request.train_step is not None  # noqa: S101 - rules that come here need it
    given = [x for x in (request.optimizer, *request.restore) if x is not None]
    arguments = _arguments(request.train_step, request.optimizer)
    with put_back(request.model, *given) as journal, eager(), torch.enable_grad():
        recorder = Recorder(request.model, layers, journal)
        try:
            with recorder.watching():
                request.train_step(request.model, copied(batch), *arguments)
        except Exception as error:
            raise CallError(
                f"train_step raised {first_line(error)}",
                help="everything check was given is back as it was; the error above has the line. "
                "A step that draws its own batches can ignore the one it is called with",
            ) from error
        return recorder.result([x for x in given if isinstance(x, Optimizer)])


def _arguments(step: TrainStep, optimizer: Optimizer | None) -> tuple[Optimizer, ...]:
    """Return what the step takes beside model and batch: the optimizer, if it asks for one."""
    try:
        signature = inspect.signature(step)
    except (TypeError, ValueError):  # some built-in functions have none
        return ()
    names = list(signature.parameters)
    asks = len(names) > 2 and names[2] == "optimizer" and optimizer is not None
    try:
        signature.bind(None, None)
    except TypeError:
        asks = True
    if not asks:
        return ()
    if optimizer is None:
        raise CallError(
            f"train_step takes {signature}, and there is no optimizer to call it with",
            help="check(model, batches, train_step=..., optimizer=optimizer)",
        )
    return (optimizer,)
