"""The instruments of a training step: who calls a norm, in which state, and what comes of it.

Four things are listened to: calls of modules, by global hooks; calls of `F.batch_norm` and of
autograd, by a TorchFunctionMode; optimizer steps, by global hooks; and, by a hook on each call's
node of the graph, which calls a backward goes through. Nothing is changed in what runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from stillnorm.diagnosis.training_step.backwards import Backwards, repeats
from stillnorm.diagnosis.training_step.optimizing import Optimizing
from stillnorm.diagnosis.training_step.stepped import Step, StepCall, same_statistics, statistics
from stillnorm.norms import NormLayer, every_module
from stillnorm.norms.adapters.keras import is_symbolic
from stillnorm.state import Journal
from stillnorm.tracing import calling_site, read, tensors_in, visits
from stillnorm.tracing.kernels import kernel_of
from stillnorm.tracing.samples import batch_moments

_TOLD = "_stillnorm_told"  # the mode that the step has put the model in


class Recorder(TorchFunctionMode):
    """Records a step. See `Step`.

    Args:
        model: The model.
        layers: Its norm layers.
        journal: Knows the tensors' values before, and keeps the optimizers that step.
    """

    def __init__(self, model: nn.Module, layers: Collection[NormLayer], journal: Journal) -> None:
        super().__init__()
        self._model, self._journal = model, journal
        self._layers = {layer.module: layer for layer in layers}
        self._modules = set(every_module(model))
        self._parameters = dict.fromkeys(model.parameters())
        self._optimizing = Optimizing(layers, self._before_step)
        self._backwards = Backwards(layers, self._parameters, lambda: self._optimizing.steps)
        self._before = {layer: statistics(layer) for layer in layers}
        self._calls: list[StepCall] = []
        self._open: list[StepCall] = []
        self._thread = threading.get_ident()
        self._running: list[nn.Module] = []
        self._forwards, self._displaced, self._taken_back = 0, False, True
        self._hooks = contextlib.ExitStack()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record while the block runs."""
        with self._hooks as stack:
            stack.callback(self._let_go)
            stack.enter_context(self._optimizing.watching())
            stack.enter_context(visits(self._enter, self._leave, other_threads=True))
            stack.enter_context(self)
            if not isinstance(self._model, torch.jit.ScriptModule):
                # The journal takes it off again.
                self._model.__dict__["train"] = _noting_train.__get__(self._model)
            yield

    def _let_go(self) -> None:
        """Part calls from the graph: no garbage collector sees that circle."""
        for call in self._calls:
            call.node = None

    # ------------------------------------------------------------------------------ modules

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module not in self._modules or is_symbolic():
            return
        in_backward = torch._C._current_graph_task_id() != -1
        if not self._running:
            self._forwards += 1
            fresh = not in_backward and self._optimizing.steps == 0
            self._displaced = fresh and self._weights_differ()
        self._running.append(module)
        if (layer := self._layers.get(module)) is not None:
            call = StepCall(
                layer,
                forward=self._forwards - 1,
                site=calling_site(),
                training=module.training,
                parents=tuple(parent.training for parent in layer.ancestors),
                grad=torch.is_grad_enabled(),
                in_backward=in_backward,
                steps=self._optimizing.steps,
                displaced=self._displaced,
                before=statistics(layer),
            )
            self._open.append(call)
            self._calls.append(call)

    def _leave(self, module: nn.Module, args: Any, *rest: Any) -> None:
        if self._running and self._running[-1] is module:
            self._running.pop()
        if not self._open or self._open[-1].layer.module is not module:
            return
        call = self._open.pop()
        raised = len(rest) == 1  # torch passes no keyword arguments then
        if not call.shape:  # a formula of the user's own, or inside a backward: by the flags
            call.training = call.layer.called_in_training({} if raised else rest[0])
            call.used = call.layer.normalizes_by(call.training)
            for x in tensors_in((args, () if raised else rest[0])):
                self._measure(call, x)
                break
        if call.node is None and not raised:
            self._follow(call, rest[1])

    def _measure(self, call: StepCall, x: Tensor) -> None:
        call.shape = tuple(x.shape)
        if x.numel() and not torch._C._functorch.is_functorch_wrapped_tensor(x):
            with torch._C.DisableTorchFunction(), torch.no_grad():
                mean, var = read(batch_moments(x))
                call.moments = mean[0], var[0]

    def _follow(self, call: StepCall, output: object) -> None:
        """Hear when a backward goes through the call."""
        node = next((y.grad_fn for y in tensors_in(output)), None)
        if node is not None:
            call.node = node
            heard = node.register_hook(lambda *_: self._backwards.goes_through(call))
            self._hooks.callback(heard.remove)

    # ------------------------------------------------------------------------------ functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad or func is Tensor.backward:
            return self._backwards.run(func, args, kwargs, self._calls)
        kernel = kernel_of(func, args, kwargs) if self._open else None
        if kernel is None:
            return func(*args, **kwargs)
        call = self._open[-1]
        call.used = kernel.used
        self._measure(call, kernel.input)  # before: a recomputation may stop in the middle
        output = func(*args, **kwargs)
        self._follow(call, output)
        return output

    # ------------------------------------------------------------------------------ weights

    def _before_step(self, optimizer: Optimizer) -> None:
        if threading.get_ident() != self._thread:
            return  # another's training
        self._journal.keep(optimizer)
        if self._optimizing.steps == 0:
            self._taken_back = not self._weights_differ()

    def _weights_differ(self) -> bool:
        """Tell whether weights are not what they were before the step."""
        with torch._C.DisableTorchFunction():
            return any(self._journal.has_changed(p) for p in self._parameters if p.requires_grad)

    # ------------------------------------------------------------------------------ the result

    def result(self, known: Iterable[Optimizer]) -> Step:
        """Return what was seen.

        Args:
            known: Optimizers that the user gave.
        """
        known = tuple(known)
        if self._optimizing.steps == 0:
            self._taken_back = not self._weights_differ()
        after = {layer: statistics(layer) for layer in self._before}
        for layer in after:
            calls = [call for call in self._calls if call.layer is layer]
            later = [*(call.before for call in calls[1:]), after[layer]]
            for call, then in zip(calls, later, strict=bool(calls)):
                call.moved = not same_statistics(call.before, then)
                call.is_recomputed = any(repeats(other, call) for other in calls)
                call.displaced &= self._taken_back
                call.gradient = self._backwards.gradient(call, calls)
        held, trained = self._optimizing.held(known), self._optimizing.trained(known)
        unheld = [p for p in self._parameters if p not in held]
        trained.update(p for p in unheld if self._journal.has_changed(p))  # by hand
        return Step(
            tuple(self._calls),
            self._optimizing.steps,
            len(self._backwards.all),
            frozenset(p for p in self._parameters if p in trained),
            frozenset(unheld),
            self._before,
            after,
            tuple(self._optimizing.frozen_moves.values()),
            tuple(self._backwards.coupled),
            self._model.__dict__.get(_TOLD) is False,
            max(self._optimizing.updates, default=None),
        )


def _noting_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Note that somebody has set the mode, and set it."""
    self.__dict__[_TOLD] = mode
    return type(self).train(self, mode)
