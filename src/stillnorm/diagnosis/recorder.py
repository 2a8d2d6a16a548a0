"""The instruments of a training step: who calls a norm, in which state, and what comes of it.

Four things are listened to: calls of modules, by global hooks; calls of `F.batch_norm` and of
autograd, by a TorchFunctionMode; optimizer steps, by global hooks; and, by a hook on each call's
node of the graph, which calls a backward goes through. Nothing is changed in what runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode

from stillnorm.diagnosis.stepped import (
    Backward,
    FrozenMove,
    Gradient,
    Step,
    StepCall,
    same_statistics,
    statistics,
)
from stillnorm.norms import NormLayer
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
        self._modules = set(model.modules())
        self._parameters = dict.fromkeys(model.parameters())
        self._before = {layer: statistics(layer) for layer in layers}
        self._calls: list[StepCall] = []
        self._open: list[StepCall] = []
        self._running: list[nn.Module] = []
        self._forwards, self._displaced, self._taken_back = 0, False, True
        self._steps, self._inside_steps = 0, 0
        self._trained: set[Tensor] = set()
        self._stepped: set[Optimizer] = set()
        self._updates: list[int] = []
        self._frozen: dict[tuple[NormLayer, str], tuple[Tensor, Tensor]] = {}
        self._frozen_moves: dict[tuple[NormLayer, str], FrozenMove] = {}
        self._backwards: list[Backward] = []
        self._current: Backward | None = None
        self._graph_task = -1
        self._witnesses = {layer: self._witness(layer) for layer in layers}
        self._had_gradient: set[NormLayer] = {x for x in layers if self._has_gradient(x)}
        self._coupled: dict[NormLayer, None] = {}
        self._hooks = contextlib.ExitStack()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record while the block runs."""
        with self._hooks as stack:
            stack.callback(self._let_go)
            stack.callback(register_optimizer_step_pre_hook(self._before_step).remove)
            stack.callback(register_optimizer_step_post_hook(self._after_step).remove)
            self._note_modes()
            stack.enter_context(visits(self._enter, self._leave))
            stack.enter_context(self)
            yield

    def _let_go(self) -> None:
        """Part calls from the graph: no garbage collector sees that circle."""
        for call in self._calls:
            call.node = None

    def _note_modes(self) -> None:
        """Hear of `train()` and `eval()` on the model; the journal takes the attribute off."""
        if not isinstance(self._model, torch.jit.ScriptModule):
            self._model.__dict__["train"] = _noting_train.__get__(self._model)

    # ------------------------------------------------------------------------------ modules

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module not in self._modules:
            return
        in_backward = torch._C._current_graph_task_id() != -1
        if not self._running:
            self._forwards += 1
            self._displaced = not in_backward and self._steps == 0 and self._has_moved()
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
                steps=self._steps,
                displaced=self._displaced,
                before=statistics(layer),
            )
            self._open.append(call)
            self._calls.append(call)

    def _leave(self, module: nn.Module, args: Any, *rest: Any) -> None:
        if module not in self._modules:
            return
        if self._running and self._running[-1] is module:
            self._running.pop()
        if not self._open or self._open[-1].layer.module is not module:
            return
        call = self._open.pop()
        if not call.shape:  # a formula of the user's own, or below a backward: the flags have to do
            call.used = call.layer.normalizes_by(module.training)
            for x in tensors_in((args, rest[:1] if len(rest) == 2 else ())):
                self._measure(call, x)
                break
        if call.node is None and len(rest) == 2:
            self._follow(call, rest[1])

    def _has_moved(self) -> bool:
        with torch._C.DisableTorchFunction():
            return any(map(self._moved, (p for p in self._parameters if p.requires_grad)))

    def _moved(self, parameter: Tensor) -> bool:
        return self._journal.has_changed(parameter)

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
            self._hooks.callback(node.register_hook(lambda *_: self._goes_through(call)).remove)

    # ------------------------------------------------------------------------------ functions

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad or func is Tensor.backward:
            return self._backward(func, args, kwargs)
        kernel = kernel_of(func, args, kwargs) if self._open else None
        if kernel is None:
            return func(*args, **kwargs)
        call = self._open[-1]
        call.used = kernel.used
        self._measure(call, kernel.input)  # before: a recomputation may stop in the middle
        output = func(*args, **kwargs)
        self._follow(call, output)
        return output

    def _backward(self, func: Any, args: Any, kwargs: Any) -> Any:
        inputs = list(tensors_in(args[1] if func is torch.autograd.grad else kwargs.get("inputs")))
        own = not inputs or any(x in self._parameters for x in inputs)
        if kwargs.get("create_graph") and inputs and not own:
            self._note_coupling(args[0], inputs)
        self._begin(own)
        try:
            return func(*args, **kwargs)
        finally:
            self._current = None
            self._had_gradient = {x for x in self._layers.values() if self._has_gradient(x)}

    # ------------------------------------------------------------------------------ backwards

    def _begin(self, of_parameters: bool) -> Backward:
        cleared = (x for x in self._had_gradient if not self._has_gradient(x))
        self._current = Backward(of_parameters, self._steps, frozenset(cleared))
        self._backwards.append(self._current)
        return self._current

    def _goes_through(self, call: StepCall) -> None:
        backward = self._current
        if backward is None:  # torch.autograd.backward was called, which no mode hears
            task = torch._C._current_graph_task_id()
            backward = self._backwards[-1] if task == self._graph_task else self._begin(True)
            self._current, self._graph_task = None, task
        call.backwards.append(backward)

    def _witness(self, layer: NormLayer) -> list[Tensor]:
        """Return parameters whose gradients show whether those of the layer have been dropped."""
        for module in (layer.module, *reversed(layer.ancestors)):
            found = [p for p in module.parameters() if p.requires_grad]
            if found:
                return list(found)
        return []

    def _has_gradient(self, layer: NormLayer) -> bool:
        with torch._C.DisableTorchFunction():
            return any(p.grad is not None and bool(p.grad.any()) for p in self._witnesses[layer])

    def _note_coupling(self, outputs: Any, inputs: list[Tensor]) -> None:
        """Note the layers with batch statistics between outputs and inputs.

        Weights that a step has computed (in meta-learning) are told by their shape.
        """
        shapes = {parameter.shape for parameter in self._parameters}
        targets = [x for x in inputs if x.shape not in shapes and x.requires_grad]
        between = _between([y.grad_fn for y in tensors_in(outputs) if y.grad_fn], targets)
        for call in self._calls:
            if call.used == "batch" and call.node in between and call.shape[0] > 1:
                self._coupled[call.layer] = None

    # ------------------------------------------------------------------------------ optimizers

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._journal.keep(optimizer)
        if self._steps == 0:
            self._taken_back = not self._has_moved()
        if self._inside_steps == 0:
            self._frozen = {
                (layer, name): (parameter, parameter.detach().clone())
                for layer in self._layers.values()
                for name in ("weight", "bias")
                if (parameter := getattr(layer, name)) is not None and not parameter.requires_grad
            }
        self._inside_steps += 1
        self._stepped.add(optimizer)
        self._updates += _counts(optimizer)
        self._note_trained(optimizer)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._note_trained(optimizer)  # the gradients may be of a closure's
        self._inside_steps -= 1
        if self._inside_steps:
            return
        self._steps += 1
        with torch._C.DisableTorchFunction():
            for (layer, name), (parameter, before) in self._frozen.items():
                by = float((parameter.detach() - before).abs().max()) if before.numel() else 0.0
                if by != 0:
                    had_gradient = parameter.grad is not None
                    move = FrozenMove(layer, name, by, had_gradient)
                    self._frozen_moves.setdefault((layer, name), move)

    def _note_trained(self, optimizer: Optimizer) -> None:
        learning = (p for p in _learning(optimizer) if p.requires_grad)
        self._trained |= {p for p in learning if p.grad is not None}

    # ------------------------------------------------------------------------------ the result

    def result(self, known: Iterable[Optimizer]) -> Step:
        """Return what was seen.

        Args:
            known: Optimizers that the user gave.
        """
        after = {layer: statistics(layer) for layer in self._layers.values()}
        if self._steps == 0:
            self._taken_back = not self._has_moved()
        for layer in self._layers.values():
            calls = [call for call in self._calls if call.layer is layer]
            later = [*(call.before for call in calls[1:]), after[layer]]
            for call, then in zip(calls, later, strict=bool(calls)):
                call.moved = not same_statistics(call.before, then)
                call.is_recomputed = any(_repeats(other, call) for other in calls)
            for call in calls:
                call.gradient = self._gradient(call)
                call.displaced &= self._taken_back
        idle = set(known) - self._stepped
        waiting = {p for optimizer in idle for p in _learning(optimizer) if p.requires_grad}
        held = {p for optimizer in idle | self._stepped for p in _held(optimizer)}
        by_hand = {p for p in self._parameters if p not in held and self._moved(p)}
        trained = self._trained | by_hand | waiting
        return Step(
            tuple(self._calls),
            self._steps,
            len(self._backwards),
            frozenset(p for p in self._parameters if p in trained),
            frozenset(p for p in self._parameters if p not in held),
            self._before,
            after,
            tuple(self._frozen_moves.values()),
            tuple(self._coupled),
            self._model.__dict__.get(_TOLD) is False,
            max(self._updates, default=None),
        )

    def _gradient(self, call: StepCall) -> Gradient:
        through = call.backwards
        if call.is_recomputed and not call.grad:  # the graph is that of the recomputation
            again = (other for other in self._calls if _repeats(other, call))
            through = [backward for other in again for backward in other.backwards]
        of_parameters = [backward for backward in through if backward.of_parameters]
        if not of_parameters:
            return "input" if through else "none"
        return "used" if any(self._is_used(call.layer, b) for b in of_parameters) else "dropped"

    def _is_used(self, layer: NormLayer, backward: Backward) -> bool:
        """Tell whether the gradients of the layer were not dropped before an optimizer step."""
        later = self._backwards[self._backwards.index(backward) + 1 :]
        dropped = next((b for b in later if layer in b.cleared), None)
        return dropped is None or dropped.steps > backward.steps


def _noting_train(self: nn.Module, mode: bool = True) -> nn.Module:
    """Note that somebody has set the mode, and set it."""
    self.__dict__[_TOLD] = mode
    return type(self).train(self, mode)


def _held(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _learning(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters that an optimizer holds with a learning rate other than 0."""
    groups = (g for g in optimizer.param_groups if g.get("lr") is None or float(g["lr"]) != 0)
    return [p for group in groups for p in group["params"]]


def _counts(optimizer: Optimizer) -> list[int]:
    """Return how many steps the optimizer has counted so far."""
    states = (state for state in optimizer.state.values() if isinstance(state, dict))
    counts = (state.get("step") for state in states)
    return [int(count) for count in counts if isinstance(count, int | float | Tensor)]


def _repeats(other: StepCall, call: StepCall) -> bool:
    """Tell whether one call does again, in a backward, what another did before."""
    if not other.in_backward or call.in_backward or other.shape != call.shape:
        return False
    if other.moments is None or call.moments is None:
        return True
    return all(map(torch.allclose, other.moments, call.moments))


def _between(starts: Iterable[Node], targets: Iterable[Tensor]) -> set[Node]:
    """Return the nodes of a graph on the ways from `starts` to `targets`."""
    above: dict[Node, list[Node]] = {}
    waiting = list(starts)
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        for below, _ in node.next_functions:
            if below is not None:
                above.setdefault(below, []).append(node)
                if below not in seen:
                    seen.add(below)
                    waiting.append(below)
    between: set[Node] = set()
    waiting = [get_gradient_edge(target).node for target in targets]
    while waiting:
        for node in above.get(waiting.pop(), ()):
            if node not in between:
                between.add(node)
                waiting.append(node)
    return between
