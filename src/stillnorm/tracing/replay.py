"""A forward that goes on where it stopped: its Python runs again, its arithmetic does not.

A tape remembers, call by call, what the functions of torch returned in a forward. Run over its tape
again, the forward gets the same results back without their being computed, as far as they were
known, and computes from there. Control flow is therefore followed as it runs, not traced; and what
has to be kept are the tensors that were alive where the forward stopped, no others: for the rest an
empty tensor of the same shape does.

Some results are not known yet, those that depend on layers still unsettled. Each such layer has a
bit; a result has the bits of all that it was computed from, by storage, so that views and writes in
place are followed. What has a bit is computed anew in each run, and what it is computed from is
kept. Where that cannot be done without risk the tape is broken, and the forward has to start from
the beginning: something kept was written to afterwards; a result that can be changed or used up
(an array, an iterator); functorch, gradients, TorchScript.
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
from stillnorm.tracing.kernels import Kernel, kernel_of
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
        tensors = tensors_in((self.batch, results))
        storages = [t.untyped_storage() for t in tensors if t.layout is torch.strided]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


class Replay(TorchFunctionMode):
    """One run of a forward over its tape.

    Args:
        tape: The tape; None to run without, only following what depends on what.
        unsettled: The layers that are not settled, each with its bit; none to follow nothing.
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
        for module, bit in unsettled.items():
            for name in ("running_mean", "running_var"):
                if isinstance(tensor := getattr(module, name, None), Tensor):
                    self._bits[_address(tensor)] = bit

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
        if self._tape is not None and isinstance(module, torch.jit.ScriptModule):
            self._tape.is_broken = True  # what it calls is not seen
        if module in self._unsettled:
            self._inside.append(module)
            with torch._C.DisableTorchFunction():
                self.depends[module] |= self._bits_of(tensors_in(args))

    def _leave(self, module: nn.Module, *rest: Any) -> None:
        if self._inside and self._inside[-1] is module:
            self._inside.pop()
            if len(rest) == 3:  # args, kwargs and output: it has not raised
                with torch._C.DisableTorchFunction():
                    self.depends[module] |= self._bits_of(tensors_in(rest[1]))

    def _note_input(self, kernel: Kernel) -> None:
        """Note what a layer normalises, which may have come to it by another way than a call."""
        layer = self._inside[-1]
        own = self._unsettled[layer]
        self.depends[layer] |= self._bits_of((kernel.input,)) & ~own

    # ------------------------------------------------------------------ calls

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._is_enough():
            self._stop()
            raise Enough
        tape = self._tape
        if tape is None and not self._unsettled:
            return func(*args, **kwargs)
        index, self._next = self._next, self._next + 1
        known = tape.entries[index] if tape is not None and index < len(tape.entries) else None
        if known is not None:
            if known.function != func:  # accessors are made anew each time, and equal
                raise Diverged
            return self._known(known)
        with torch._C.DisableTorchFunction():  # the model's calls are watched, these are ours
            given = list(tensors_in((args, kwargs)))
            bits = self._bits_of(given)
            for layer in self._inside:
                bits |= self._unsettled[layer]
            if self._inside and (kernel := kernel_of(func, args, kwargs)) is not None:
                self._note_input(kernel)
            clean = [(t, _version(t)) for t in given if not self._has_bits(t)] if bits else []
        result = func(*args, **kwargs)
        if func is Tensor.__iter__:
            result = tuple(result)
        with torch._C.DisableTorchFunction():
            made = list(tensors_in(result))
            if bits and not made and result is not None and func not in _LAYOUT:
                self._all |= bits
            self._mark(made, given, bits, writes=result is None)
            if tape is not None:
                self._record(tape, index, func, result, clean, bits)
        return iter(result) if func is Tensor.__iter__ else result

    def _record(
        self,
        tape: Tape,
        index: int,
        func: Any,
        result: Any,
        clean: list[tuple[Tensor, int | None]],
        bits: int,
    ) -> None:
        entry = None
        if bits:
            self._keep(tape, clean)
        elif not _is_plain(result) or _is_transformed():
            tape.is_broken = True
        else:
            entry = _Entry(func, _each(_weak_or_hollow, result))
        if index < len(tape.entries):
            tape.entries[index] = entry
        else:
            tape.entries.append(entry)

    def _known(self, entry: _Entry) -> Any:
        """Return the result; from here on it lives as long as the forward needs it."""
        with torch._C.DisableTorchFunction():
            result = _each(_filled, entry.result)
            entry.result = _each(_weak_or_hollow, entry.result)
        return iter(result) if entry.function is Tensor.__iter__ else result

    @staticmethod
    def _keep(tape: Tape, clean: list[tuple[Tensor, int | None]]) -> None:
        """Keep what a call that will be made again was given."""
        for tensor, version in clean:
            # Written with what is not known yet; of inference tensors nobody can tell.
            if version is None or _version(tensor) != version:
                tape.is_broken = True
            tape.kept.append((tensor, version))

    def _bits_of(self, tensors: Any) -> int:
        bits = self._all
        for tensor in tensors:
            bits |= self._bits.get(_address(tensor), 0)
        return bits

    def _has_bits(self, tensor: Tensor) -> bool:
        return bool(self._bits.get(_address(tensor)))

    def _mark(self, made: list[Tensor], given: list[Tensor], bits: int, *, writes: bool) -> None:
        taken = {_address(t) for t in given}
        for tensor in made:
            address = _address(tensor)
            before = self._bits.get(address, 0) if address in taken else 0
            self._bits[address] = before | bits
        if bits and writes:  # item assignment, and what else writes and returns nothing
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


def _is_plain(result: Any) -> bool:
    """Tell whether a result stays what it is, however often it is handed out."""
    if isinstance(result, Tensor):
        return (
            type(result) in (Tensor, nn.Parameter)
            and result.layout is torch.strided
            and not result.is_quantized
            and not result.requires_grad
        )
    if isinstance(result, list | tuple):
        return all(map(_is_plain, result))
    return isinstance(result, _CONSTANTS)


_CONSTANTS = (
    type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.layout,
    torch.memory_format,
)  # fmt: skip


def _is_transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.is_grad_enabled()


def _address(tensor: Tensor) -> int:
    """Return where a tensor's values are; of one without memory of its own, which one it is."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_nested:
        return id(tensor)
    return tensor.untyped_storage().data_ptr()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
