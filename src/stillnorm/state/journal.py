"""Putting back everything that a training step changes: model, optimizer, scheduler, scaler, EMA.

`preserved` knows what a forward may touch. A training step may touch anything that can be reached,
so the journal notes all of it: the attributes of modules and of what has a `state_dict`, the items
of every list and dict in them, and of every tensor the value, the version counter, `requires_grad`
and `.grad`. Afterwards the same objects hold the same things; what the step has added is gone.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import operator
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from stillnorm.norms import random_kept, same_bits
from stillnorm.norms.adapters.keras import keeps_state
from stillnorm.norms.tensors import write
from stillnorm.state.kept import lazies_kept

_version_kept = torch.autograd._unsafe_preserve_version_counter  # type: ignore[attr-defined]


@contextlib.contextmanager
def put_back(*objects: object) -> Iterator[Journal]:
    """Let anything happen to the objects inside the block; afterwards they are as they were.

    Everything that is reachable goes back, also after an exception and Ctrl-C: through modules,
    optimizers, whatever else has `state_dict` and `load_state_dict` (schedulers, scalers, averages
    of weights), Keras' variables, optimizers and metrics, data classes, lists, dicts and sets. A
    graph that was recorded before the block may run backward after it. So do the random states and
    the grad mode. Other objects (a trainer that a module points to, what a closure owns) are not
    looked into.

    Args:
        objects: A model, its optimizers, and what else a step changes.

    Yields:
        The journal, which can `keep` more, and knows what values were `before`.

    Cost:
        One copy of every tensor: of weights, gradients and the optimizer's state.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> before = net.weight.detach().clone()
        >>> with put_back(net, optimizer):
        ...     net(torch.ones(1, 2)).sum().backward()
        ...     optimizer.step()
        >>> torch.equal(net.weight, before), net.weight.grad, len(optimizer.state)
        (True, None, 0)
    """
    grad_mode = torch.is_grad_enabled()
    with random_kept(), contextlib.ExitStack() as undo:
        # A surrounding autocast keeps casts of weights that were other weights meanwhile.
        undo.callback(torch.clear_autocast_cache)
        undo.callback(torch.set_grad_enabled, grad_mode)
        journal = Journal(undo)
        journal.keep(*objects)
        yield journal


class Journal:
    """What `put_back` has noted. Each object is noted once, as it was then.

    Args:
        undo: Receives what puts things back.
    """

    def __init__(self, undo: contextlib.ExitStack) -> None:
        self._undo = undo
        self._seen: dict[int, object] = {}  # holds the objects too: an id is theirs while they live
        self._values: dict[int, Tensor] = {}

    def keep(self, *objects: object) -> None:
        """Note more objects, as they are now."""
        waiting = list(objects)
        tensors: list[Tensor] = []
        modules: list[nn.Module] = []
        contents: list[Callable[[], object]] = []
        while waiting:
            thing = waiting.pop()
            if isinstance(thing, _ATOMS) or id(thing) in self._seen:
                continue
            self._seen[id(thing)] = thing
            if isinstance(thing, Tensor):
                tensors.append(thing)
                waiting += _attached(thing)
            elif isinstance(thing, nn.Module):
                modules.append(thing)
                if isinstance(thing, torch.jit.ScriptModule):  # whose attributes are not Python's
                    waiting += [*thing.parameters(), *thing.buffers(), *thing.children()]
            for inside in _contents(thing, is_given=any(thing is given for given in objects)):
                contents.append(_refilling(inside))
                self._seen[id(inside)] = inside
                waiting += _items(inside)
            if isinstance(thing, tuple | frozenset):
                waiting += thing
            elif (again := _opaque(thing)) is not None:
                contents.append(again)
        self._keep_modules(modules)
        self._keep_tensors(tensors)
        self._undo.callback(_each, _called, [(refill,) for refill in contents])

    def before(self, tensor: Tensor) -> Tensor | None:
        """Return a copy of what the tensor held when it was noted; None for one that was not."""
        return self._values.get(id(tensor))

    def has_changed(self, tensor: Tensor) -> bool:
        """Tell whether the tensor's bits are no longer those that were noted."""
        before = self.before(tensor)
        return before is not None and not _same(tensor, before)

    def _keep_modules(self, modules: list[nn.Module]) -> None:
        for module in modules:
            if isinstance(module, LazyModuleMixin):
                self._undo.enter_context(lazies_kept(module))
        scripted = [m for m in modules if isinstance(m, torch.jit.ScriptModule)]
        modes = [(m, "training", m.training) for m in scripted if hasattr(m, "training")]
        self._undo.callback(_each, setattr, modes)
        self._undo.callback(_each, _be_of_class, [(m, type(m)) for m in modules])

    def _keep_tensors(self, tensors: list[Tensor]) -> None:
        """Note tensors. What is registered last goes back first: the graph, then memory."""
        lazy = UninitializedParameter | UninitializedBuffer
        tensors = [tensor for tensor in tensors if not isinstance(tensor, lazy)]
        leaves = [tensor for tensor in tensors if tensor.is_leaf]
        real = [tensor for tensor in tensors if not tensor.is_meta]
        for tensor in real:
            self._values[id(tensor)] = tensor.detach().clone()
        self._undo.callback(_each, _set_attached, [(x, _attached(x)) for x in leaves])
        self._undo.enter_context(_version_kept(tuple(x for x in real if not x.is_inference())))
        values = [(tensor, tensor.data, self._values[id(tensor)]) for tensor in real]
        self._undo.callback(_each, _put_value, values)
        self._undo.callback(_each, _be_leaf, [(x, x.requires_grad) for x in leaves])


def _each(undo: Callable[..., object], arguments: list[tuple[Any, ...]]) -> None:
    """Undo all, whatever one of them raises."""
    errors = []
    for each in arguments:
        try:
            undo(*each)
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _be_of_class(module: nn.Module, kind: type[nn.Module]) -> None:
    if type(module) is not kind:
        object.__setattr__(module, "__class__", kind)  # wrappers hand attributes on


def _called(function: Callable[[], object]) -> None:
    function()


_ATOMS = (str, bytes, int, float, complex, type(None), type, torch.dtype, torch.device)


def _contents(thing: object, is_given: bool) -> list[Any]:
    """Return the containers whose items are the object's own: itself, or its attributes."""
    if isinstance(thing, dict | list | set | deque):
        return [thing]
    if isinstance(thing, torch.jit.ScriptModule):
        return []
    looks_inside = (
        is_given
        or isinstance(thing, nn.Module | Optimizer | Tensor)
        or dataclasses.is_dataclass(type(thing))
        or _has_state(thing)
        or keeps_state(thing)
    )
    attributes = getattr(thing, "__dict__", None)
    return [attributes] if looks_inside and isinstance(attributes, dict) else []


def _has_state(thing: object) -> bool:
    """Ask the class: an object may claim to have any attribute."""
    return hasattr(type(thing), "state_dict") and hasattr(type(thing), "load_state_dict")


def _items(container: Any) -> list[object]:
    """Return keys and values, or the items."""
    if (kind := _mapping(container)) is not None:
        return [*kind.keys(container), *kind.values(container)]
    return list(container)


def _mapping(container: object) -> type[dict[Any, Any]] | None:
    """Return the class by whose methods to read and write a dict.

    Subclasses have a say in what is written (transformers' outputs), and this is none of it.
    """
    if isinstance(container, OrderedDict):
        return OrderedDict
    return dict if isinstance(container, dict) else None


def _refilling(container: Any) -> Callable[[], None]:
    """Return what gives a container the items, in the order, that it has now."""
    before = _items(container)

    def refill() -> None:
        now = _items(container)
        if len(now) == len(before) and all(map(operator.is_, now, before)):
            return
        if isinstance(container, list):
            container[:] = before
        elif isinstance(container, set):
            container.clear()
            container.update(before)
        elif isinstance(container, deque):
            container.clear()
            container.extend(before)
        elif (kind := _mapping(container)) is not None:
            half = len(before) // 2
            kind.clear(container)
            for key, value in zip(before[:half], before[half:], strict=True):
                kind.__setitem__(container, key, value)

    return refill


def _opaque(thing: Any) -> Callable[[], object] | None:
    """Return what sets the state of an object that only tells it by methods, or None."""
    if isinstance(thing, torch.Generator):
        state = thing.get_state()
        return lambda: thing.set_state(state)
    if hasattr(thing, "__dict__") or not _has_state(thing):
        return None
    kept = copy.deepcopy(thing.state_dict())
    return lambda: thing.load_state_dict(kept)


def _attached(tensor: Tensor) -> list[Any]:
    """Return a leaf's gradient and hooks; nothing of other tensors, which only pass them on."""
    if not tensor.is_leaf:
        return []
    hooks = tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)
    return [tensor.grad, *hooks]


def _set_attached(tensor: Tensor, attached: list[Any]) -> None:
    grad, hooks, accumulated = attached
    if tensor.grad is not grad:
        tensor.grad = grad
    if tensor._backward_hooks is not hooks:
        tensor._backward_hooks = hooks
    if getattr(tensor, "_post_accumulate_grad_hooks", None) is not accumulated:
        tensor._post_accumulate_grad_hooks = accumulated


def _be_leaf(tensor: Tensor, required: bool) -> None:
    """Cut a tensor out of a graph that in-place operators have drawn it into."""
    if not tensor.is_leaf:
        tensor.detach_()
    if tensor.requires_grad != required:
        tensor.requires_grad_(required)


def _put_value(tensor: Tensor, data: Tensor, value: Tensor) -> None:
    """Write a value back, in place, into the memory that the tensor had."""
    if tensor.layout is torch.strided and (
        _type(tensor) != _type(data)
        or tensor.data_ptr() != data.data_ptr()
        or tensor.stride() != data.stride()
    ):
        tensor.data = data
    if not _same(tensor, value):
        write(tensor, value)


def _type(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.device


def _same(tensor: Tensor, value: Tensor) -> bool:
    if tensor.is_quantized or tensor.layout is not torch.strided:  # these have no bytes to view
        return False
    return same_bits(tensor, value)
