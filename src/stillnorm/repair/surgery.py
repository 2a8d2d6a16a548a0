"""Edits of a model that are taken back in reverse order, at once where anything is raised."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stillnorm.errors import StateError
from stillnorm.norms import must_be_a_model, write
from stillnorm.tracing import is_sharded


class Surgery:
    """A list of edits, each with what takes it back.

    As a context manager it takes all of them back if the block raises, Ctrl-C included; otherwise
    they stay until `undo`.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self.undo()

    def undo(self) -> None:
        """Take all edits back, the last one first."""
        while self._undo:
            self._undo[-1]()  # first done, then forgotten: an interruption can be repeated
            self._undo.pop()

    def note(self, undo: Callable[[], object]) -> None:
        """Add what takes an edit back, before it is made."""
        self._undo.append(undo)

    def part(self) -> Surgery:
        """Return edits that can be taken back alone, and are with these."""
        made = Surgery()
        self.note(made.undo)
        return made

    def set_child(self, parent: nn.Module, name: str, child: nn.Module) -> None:
        """Put another module in the place of a child."""
        children = parent._modules
        before, mode = children[name], child.training

        def restore() -> None:
            now = children[name]
            if before is not None and now is child and now.training != mode:
                before.train(now.training)  # what has been asked of the place since then
            children[name] = before

        self.note(restore)
        children[name] = child

    def add_hook(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Call `hook` after every forward of the module."""
        self._take_away(module._forward_hooks, hook)
        module.register_forward_hook(hook)

    def _take_away(self, hooks: dict[int, Any], hook: Any) -> None:
        def restore() -> None:
            for key in [key for key, other in hooks.items() if other is hook]:
                del hooks[key]

        self.note(restore)

    def add_pre_hook(self, module: nn.Module, hook: Callable[..., None]) -> None:
        """Call `hook` before every forward of the module, before its other hooks."""
        self._take_away(module._forward_pre_hooks, hook)
        module.register_forward_pre_hook(hook, prepend=True)

    def set_buffer(self, module: nn.Module, name: str, value: Tensor | None) -> None:
        """Register a tensor, or nothing, as a buffer."""
        buffers = module._buffers
        there, before = name in buffers, buffers.get(name)

        def restore() -> None:
            if there:
                buffers[name] = before
            else:
                buffers.pop(name, None)

        self.note(restore)
        buffers[name] = value

    def keep(self, tensor: Tensor) -> None:
        """Note a tensor's values, which are going to be written."""
        value = tensor.detach().clone()
        self.note(lambda: write(tensor, value))

    def write(self, tensor: Tensor, value: Tensor) -> None:
        """Write values into a tensor, in place."""
        self.keep(tensor)
        write(tensor, value)

    def set_data(self, tensor: Tensor, value: Tensor) -> None:
        """Give a tensor another memory; the object stays."""
        before = tensor.data

        def restore() -> None:
            tensor.data = before

        self.note(restore)
        tensor.data = value

    def set_grad(self, parameter: Tensor, grad: Tensor | None) -> None:
        """Give a parameter another gradient."""
        before = parameter.grad

        def restore() -> None:
            parameter.grad = before

        self.note(restore)
        parameter.grad = grad

    def set_item(self, registered: dict[str, Any], name: str, value: Any) -> None:
        """Put another object under a name that there is."""
        before = registered[name]
        self.note(lambda: registered.__setitem__(name, before))
        registered[name] = value

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set a plain attribute."""
        self.set_item(module.__dict__, name, value)


def refuse_wrapped(model: nn.Module) -> None:
    """Raise where a wrapper for distributed training knows the model's tensors.

    Raises:
        ModelError: It is no model of torch's.
        StateError: The model, or a part of it, is wrapped.
    """
    must_be_a_model(model)
    wrapped = any(isinstance(module, DistributedDataParallel) for module in model.modules())
    if wrapped or is_sharded(model):
        raise StateError(
            "the model is wrapped for distributed training, and the wrapper knows its tensors",
            help="do this first, then wrap",
        )
