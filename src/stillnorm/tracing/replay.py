"""A forward that goes on where it stopped: its Python runs again, its arithmetic does not.

A tape remembers, call by call, what the functions of torch returned in a forward. Run over its tape
again, the forward gets the same results back without their being computed, as far as they were
known, and computes from there. Control flow is therefore followed as it runs, not traced; and what
has to be kept are the tensors that were alive where the forward stopped, no others: for the rest an
empty tensor of the same shape does.

Some results are not known yet, those that depend on layers still unsettled. Each such layer has a
bit; a result has the bits of all that it was computed from, by storage, so that views and writes in
place are followed. What has a bit is computed anew in each run, and what it is computed from is
kept. Where that cannot be done without risk (something kept was written to afterwards) the tape is
given up and the forward starts from the beginning.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from stillnorm.holding.deferred import METADATA
from stillnorm.tracing.batches import tensors_in
from stillnorm.tracing.visits import visits

_LAYOUT = METADATA | {
    Tensor.stride,
    Tensor.is_contiguous,
    Tensor.storage_offset,
    Tensor.element_size,
    Tensor.data_ptr,
    Tensor.get_device,
    Tensor.is_complex,
    Tensor.ndimension,
    Tensor.nelement,
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.is_sparse.__get__,  # type: ignore[attr-defined]
    Tensor.is_quantized.__get__,  # type: ignore[attr-defined]
    Tensor.is_meta.__get__,  # type: ignore[attr-defined]
    Tensor.is_leaf.__get__,  # type: ignore[attr-defined]
    Tensor.grad_fn.__get__,  # type: ignore[union-attr]
    torch.is_tensor,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}


class Enough(BaseException):
    """Raised inside a forward that need not go on; no handler of the user's is meant to see it."""


class Diverged(BaseException):
    """Raised where a forward does other things than its tape has."""


@dataclass(frozen=True)
class _Hollow:
    """What a tensor was, that nobody needs the values of."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def filled(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


@dataclass
class _Entry:
    """One call: the function, and its result with weak references for tensors, until it stops."""

    function: Any
    result: Any


@dataclass
class Tape:
    """What a forward on one batch has computed so far.

    Args:
        batch: The batch, of which nobody else has the tensors.
    """

    batch: object
    entries: list[_Entry | None] = field(default_factory=list)
    kept: list[tuple[Tensor, int | None]] = field(default_factory=list)
    is_broken: bool = False

    def nbytes(self) -> int:
        """Return the number of bytes kept, the batch included."""
        results = [
            entry.result
            for entry in self.entries
            if entry is not None and isinstance(entry.result, Tensor | list | tuple | dict)
        ]
        storages = [t.untyped_storage() for t in tensors_in((self.batch, results))]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class Replay(TorchFunctionMode):
    """One run of a forward over its tape.

    Args:
        tape: The tape; None to run without.
        unsettled: The layers that are not settled, each with its bit.
        is_enough: Whether the forward need not go on; asked before every call.
    """

    def __init__(
        self,
        tape: Tape | None,
        unsettled: Mapping[nn.Module, int],
        is_enough: Callable[[], bool],
    ) -> None:
        super().__init__()
        self.depends: dict[nn.Module, int] = dict.fromkeys(unsettled, 0)
        self._tape = tape
        self._unsettled = unsettled
        self._is_enough = is_enough
        self._next = 0
        self._inside: list[nn.Module] = []
        self._bits: dict[int, int] = {}  # by address of the storage
        self._all = 0  # the bits of values that Python has seen: everything after depends on them

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Replay and record while the block runs; the block ends where it is enough."""
        try:
            with visits(self._enter, self._leave), self:
                yield
            self._stop()
        except Enough:
            return
        finally:
            self._is_enough = _never  # what it asks may hold on to this run

    # ------------------------------------------------------------------ layers

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module in self._unsettled:
            self._inside.append(module)
            with torch._C.DisableTorchFunction():
                self.depends[module] |= self._bits_of(tensors_in(args))

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if self._inside and self._inside[-1] is module:
            self._inside.pop()

    # ------------------------------------------------------------------ calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_enough():
            self._stop()
            raise Enough
        tape = self._tape
        if tape is None:
            return func(*args, **kwargs)
        index, self._next = self._next, self._next + 1
        known = tape.entries[index] if index < len(tape.entries) else None
        if known is not None:
            if known.function != func:  # accessors are made anew each time, and equal
                raise Diverged
            return self._known(known)
        with torch._C.DisableTorchFunction():  # the model's calls are watched, these are ours
            given = list(tensors_in((args, kwargs)))
            bits = self._bits_of(given)
            for layer in self._inside:
                bits |= self._unsettled[layer]
            clean = [(t, _version(t)) for t in given if not self._bits_of((t,))] if bits else []
        result = func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            made = list(tensors_in(result))
            entry = None
            if bits:
                self._keep(tape, clean)
                if not made and result is not None and func not in _LAYOUT:
                    self._all |= bits
            else:
                entry = _Entry(func, _each(_weak_or_hollow, result))
            self._mark(made, given, bits)
        if index < len(tape.entries):
            tape.entries[index] = entry
        else:
            tape.entries.append(entry)
        return result

    def _known(self, entry: _Entry) -> Any:
        """Return the result; from here on it lives as long as the forward needs it."""
        with torch._C.DisableTorchFunction():
            result = _each(_filled, entry.result)
            entry.result = _each(_weak_or_hollow, entry.result)
        return result

    @staticmethod
    def _keep(tape: Tape, clean: list[tuple[Tensor, int | None]]) -> None:
        """Keep what a call that will be made again was given."""
        for tensor, version in clean:
            if _version(tensor) != version:  # it was written with what is not known yet
                tape.is_broken = True
            tape.kept.append((tensor, version))

    def _bits_of(self, tensors: Any) -> int:
        bits = self._all
        for tensor in tensors:
            bits |= self._bits.get(_address(tensor), 0)
        return bits

    def _mark(self, made: list[Tensor], given: list[Tensor], bits: int) -> None:
        taken = {_address(t) for t in given}
        for tensor in made:
            address = _address(tensor)
            before = self._bits.get(address, 0) if address in taken else 0
            self._bits[address] = before | bits
        if bits and not made:  # item assignment, and what else writes and returns nothing
            for tensor in given[:1]:
                self._bits[_address(tensor)] = self._bits.get(_address(tensor), 0) | bits

    def _stop(self) -> None:
        """Keep what is alive, and what calls to be made again were given; let go of the rest."""
        if (tape := self._tape) is None:
            return
        with torch._C.DisableTorchFunction():
            if any(_version(tensor) != version for tensor, version in tape.kept):
                tape.is_broken = True
            for entry in tape.entries:
                if entry is not None:
                    entry.result = _each(_settled, entry.result)
            tape.kept.clear()


def _never() -> bool:
    return False


@dataclass(frozen=True)
class _Weak:
    """A tensor that is kept only if the forward keeps it."""

    tensor: weakref.ref[Tensor]
    otherwise: _Hollow


def _each(change: Callable[[Any], Any], result: Any) -> Any:
    """Change every leaf of a result; most results are one tensor."""
    if isinstance(result, Tensor | _Hollow | _Weak):
        return change(result)
    return tree_map(change, result) if isinstance(result, list | tuple | dict) else result


def _filled(leaf: Any) -> Any:
    return leaf.filled() if isinstance(leaf, _Hollow) else leaf


def _weak_or_hollow(leaf: Any) -> Any:
    if type(leaf) is not Tensor or leaf.layout is not torch.strided:
        return leaf
    hollow = _Hollow(tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.device)
    return _Weak(weakref.ref(leaf), hollow)


def _settled(leaf: Any) -> Any:
    if not isinstance(leaf, _Weak):
        return leaf
    tensor = leaf.tensor()
    return leaf.otherwise if tensor is None else tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
