"""Everything observable of a model, for comparing it with itself later, to the last byte.

Objects are compared by identity and tensors also by bits, so a fingerprint holds on to both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def _bits(tensor: Tensor) -> tuple[Any, ...]:
    if tensor.is_meta or isinstance(tensor, nn.parameter.UninitializedTensorMixin):
        return (str(tensor.dtype),)
    raw = tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8)
    return (tensor.shape, tensor.stride(), tensor.dtype, raw.numpy().tobytes())


class Fingerprint:
    """What there is to see of a model: `==` compares, `differences` says where."""

    def __init__(self, model: nn.Module, versions: bool = True) -> None:
        self.seen: dict[str, Any] = {}
        self.kept_alive: list[Any] = []
        self.versions = versions
        self.seen["random state"] = torch.get_rng_state().numpy().tobytes()
        for path, module in model.named_modules(remove_duplicate=False):
            self._note(f"{path}.__class__", type(module))
            for name, value in module.__dict__.items():
                self._value(f"{path}.{name}", value)
            self.seen[f"{path} attributes"] = tuple(module.__dict__)

    def _note(self, where: str, thing: Any) -> None:
        self.kept_alive.append(thing)
        self.seen[where] = id(thing)

    def _value(self, where: str, value: Any) -> None:
        if isinstance(value, bool | int | float | str | type(None)):
            self.seen[where] = (type(value), value)
        elif isinstance(value, Tensor):
            self._tensor(where, value)
        elif isinstance(value, dict):
            self._note(where, value)
            self.seen[f"{where} keys"] = tuple(map(str, value))
            for key, item in value.items():
                self._value(f"{where}[{key}]", item)
        elif isinstance(value, list | tuple | set):
            self._note(where, value)
            for index, item in enumerate(value):
                self._value(f"{where}[{index}]", item)
        elif type(value).__name__ == "Hold":
            self._note(where, value)
            self.seen[f"{where} content"] = repr(value)
        else:
            self._note(where, value)

    def _tensor(self, where: str, tensor: Tensor) -> None:
        self._note(where, tensor)
        if isinstance(tensor, nn.parameter.UninitializedTensorMixin):
            self.seen[f"{where} is lazy"] = True
            return
        self.seen[f"{where} bits"] = _bits(tensor)
        self.seen[f"{where} pointer"] = None if tensor.is_meta else tensor.data_ptr()
        self.seen[f"{where} requires_grad"] = tensor.requires_grad
        if self.versions and not tensor.is_inference():
            self.seen[f"{where} version"] = tensor._version
        if tensor.is_leaf and tensor.grad is not None:
            self._note(f"{where}.grad", tensor.grad)
            self.seen[f"{where}.grad bits"] = _bits(tensor.grad)

    def differences(self, other: Fingerprint) -> list[str]:
        """Return where the two differ."""
        names = {*self.seen, *other.seen}
        return sorted(n for n in names if self.seen.get(n, ...) != other.seen.get(n, ...))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and not self.differences(other)

    __hash__ = None  # type: ignore[assignment]


def values(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Return the bits of every parameter and buffer, by name."""
    named = [*model.named_parameters(remove_duplicate=False)]
    named += [*model.named_buffers(remove_duplicate=False)]
    return {name: _bits(tensor) for name, tensor in named}


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """Return shape, dtype and bytes of a tensor, whatever its memory format."""
    shape, _, dtype, raw = _bits(tensor)
    return shape, dtype, raw
