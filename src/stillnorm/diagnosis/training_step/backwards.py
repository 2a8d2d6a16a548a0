"""Which calls a backward goes through, and whether an optimizer step uses what it computes.

Gradients that were dropped are told by where they are missing: a layer had some after one backward,
and has none before the next.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from stillnorm.diagnosis.training_step.stepped import Backward, Gradient, StepCall
from stillnorm.norms import NormLayer
from stillnorm.tracing import tensors_in


class Backwards:
    """The backwards of a step.

    Args:
        layers: The norm layers.
        parameters: The parameters of the model.
        steps: Tells how many optimizer steps have been taken.
    """

    def __init__(
        self,
        layers: Collection[NormLayer],
        parameters: Collection[Tensor],
        steps: Callable[[], int],
    ) -> None:
        self.all: list[Backward] = []
        self.coupled: dict[NormLayer, None] = {}
        self._parameters = parameters
        self._steps = steps
        self._current: Backward | None = None
        self._graph_task = -1
        self._witnesses = {layer: _witnesses(layer) for layer in layers}
        self._had_gradient = self._with_gradient()

    def run(self, func: Any, args: Any, kwargs: Any, calls: Sequence[StepCall]) -> Any:
        """Make a call of `torch.autograd.grad` or `Tensor.backward`."""
        inputs = list(tensors_in(args[1] if func is torch.autograd.grad else kwargs.get("inputs")))
        of_parameters = not inputs or any(x in self._parameters for x in inputs)
        if kwargs.get("create_graph") and not of_parameters:
            self._note_coupling(args[0], inputs, calls)
        self._current = self._begin(of_parameters)
        try:
            return func(*args, **kwargs)
        finally:
            self._current = None
            self._had_gradient = self._with_gradient()

    def goes_through(self, call: StepCall) -> None:
        """Note that a backward is at a call."""
        backward = self._current
        if backward is None:  # torch.autograd.backward was called, which no mode hears
            task = torch._C._current_graph_task_id()
            backward = self.all[-1] if task == self._graph_task else self._begin(True)
            self._graph_task = task
        call.backwards.append(backward)

    def gradient(self, call: StepCall, calls: Sequence[StepCall]) -> Gradient:
        """Tell what became of the gradient through a call.

        Args:
            call: The call.
            calls: All calls of its layer.
        """
        through = call.backwards
        if call.is_recomputed and not call.grad:  # the graph is that of the recomputation
            again = (other for other in calls if repeats(other, call))
            through = [backward for other in again for backward in other.backwards]
        of_parameters = [backward for backward in through if backward.of_parameters]
        if not of_parameters:
            return "input" if through else "none"
        return "used" if any(self._is_used(call.layer, b) for b in of_parameters) else "dropped"

    def _is_used(self, layer: NormLayer, backward: Backward) -> bool:
        """Tell whether the gradients of the layer were not dropped before an optimizer step."""
        later = self.all[self.all.index(backward) + 1 :]
        dropped = next((b for b in later if layer in b.cleared), None)
        return dropped is None or dropped.steps > backward.steps

    def _begin(self, of_parameters: bool) -> Backward:
        cleared = self._had_gradient - self._with_gradient()
        self.all.append(Backward(of_parameters, self._steps(), cleared))
        return self.all[-1]

    def _with_gradient(self) -> frozenset[NormLayer]:
        with torch._C.DisableTorchFunction():
            return frozenset(
                layer
                for layer, parameters in self._witnesses.items()
                if any(p.grad is not None and bool(p.grad.any()) for p in parameters)
            )

    def _note_coupling(
        self, outputs: object, inputs: Sequence[Tensor], calls: Sequence[StepCall]
    ) -> None:
        """Note the layers with batch statistics between outputs and inputs.

        Weights that a step has computed (in meta-learning) are told by their shape.
        """
        shapes = {parameter.shape for parameter in self._parameters}
        targets = [x for x in inputs if x.shape not in shapes and x.requires_grad]
        between = _between([y.grad_fn for y in tensors_in(outputs) if y.grad_fn], targets)
        for call in calls:
            if call.used == "batch" and call.node in between and call.shape[0] > 1:
                self.coupled[call.layer] = None


def repeats(other: StepCall, call: StepCall) -> bool:
    """Tell whether one call does again, in a backward, what another did before."""
    if not other.in_backward or call.in_backward or other.shape != call.shape:
        return False
    if other.moments is None or call.moments is None:
        return True
    return all(map(torch.allclose, other.moments, call.moments))


def _witnesses(layer: NormLayer) -> list[Tensor]:
    """Return parameters whose gradients show whether those of the layer have been dropped."""
    for module in (layer.module, *reversed(layer.ancestors)):
        found = [p for p in module.parameters() if p.requires_grad]
        if found:
            return list(found)
    return []


def _between(starts: Iterable[Node], targets: Iterable[Tensor]) -> set[Node]:
    """Return the nodes of a graph on the ways from `starts` to `targets`."""
    above: dict[Node, list[Node]] = {}
    waiting = [node for node in starts if node is not None]  # of tensors inside vmap there is none
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
