"""One forward that follows every output of a convolution or a norm to whoever uses it.

What is followed are the calls themselves, `F.conv2d` and `F.batch_norm` and their kind, and tensors
by identity: no symbolic trace, so control flow, foreign forwards and shared layers are seen as they
run.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from stillnorm.convolutions import Convolution, convolution_of, is_convolution
from stillnorm.holding.algebra import needs_plain_ops
from stillnorm.holding.deferred import METADATA
from stillnorm.holding.folding import is_convolutional
from stillnorm.norms import NormLayer
from stillnorm.tracing.batches import tensors_in
from stillnorm.tracing.kernels import Kernel, kernel_of
from stillnorm.tracing.site import Site, calling_site
from stillnorm.tracing.strangers import strangers_kept
from stillnorm.tracing.visits import visits


@dataclass(frozen=True, eq=False)
class Use:
    """One use of an output.

    Args:
        what: The function that uses it.
        site: The user's line, if any.
        by: The convolution, linear or norm layer whose own call it is; None for any other function.
    """

    what: str
    site: Site | None
    by: nn.Module | None = None

    def __str__(self) -> str:
        return self.what if self.site is None else f"{self.what} ({self.site})"


LayerCall = Convolution | Kernel
OnLink = Callable[["Output", Use, LayerCall | None], None]


@dataclass(eq=False)
class Output:
    """An output of a convolution, a linear layer or a norm.

    Args:
        module: The layer.
        shape: Its shape.
        weight_size: The number of elements of a convolution's weight; of a norm 0.
        uses_own: Whether a convolution used the layer's weight and bias as they are.
        call: The call it comes from, until its first use: calls keep their tensors alive.
        version: The version of a norm's input.
        uses: Who uses it, in order.
        is_kept: Whether it is alive after the forward: in the model's output, or stored.
        is_stale: Whether the input or weight that made it was written before the first use.
    """

    module: nn.Module
    shape: tuple[int, ...]
    weight_size: int
    uses_own: bool
    call: LayerCall | None
    version: int = 0
    uses: list[Use] = field(default_factory=list)
    is_kept: bool = False
    is_stale: bool = False


@dataclass(frozen=True, eq=False)
class Links:
    """Who fed whom in one forward.

    Args:
        outputs: The outputs that were followed, in order.
        sources: By norm layer, what each of its inputs is: an output, or the name of the function
            that made it (None for an input of the model).
        elsewhere: Layers whose weight or bias something else than their own forward used.
    """

    outputs: tuple[Output, ...]
    sources: dict[nn.Module, tuple[Output | str | None, ...]]
    elsewhere: dict[nn.Module, str]


def links(
    model: nn.Module,
    norms: Collection[NormLayer],
    call: Callable[[], object],
    on_link: OnLink | None = None,
) -> Links:
    """Run the model once and follow the outputs of its convolutions and norms.

    Args:
        model: The model.
        norms: Its norm layers.
        call: Runs it.
        on_link: Called with an output, its first use by a norm or a convolution, and the call that
            is about to use it; a foreign frozen layer makes none that is known.

    Returns:
        Who fed whom.
    """
    follow = _Follow(model, norms, on_link)
    with strangers_kept(model), follow.watching():
        output = call()
        follow.mark_kept(output)
    return follow.result()


class _Follow(TorchFunctionMode):
    """Follows tensors by identity through the functions that are called on them."""

    def __init__(
        self,
        model: nn.Module,
        norms: Collection[NormLayer],
        on_link: OnLink | None,
    ) -> None:
        super().__init__()
        self.outputs: list[Output] = []
        self.sources: dict[nn.Module, list[Output | str | None]] = {}
        self.elsewhere: dict[nn.Module, str] = {}
        self._norms = {norm.module: norm for norm in norms}
        self._parameters = {
            id(p): module
            for module in model.modules()
            if is_convolutional(module)
            for p in module.parameters(recurse=False)
        }
        self._on_link = on_link
        self._running: list[nn.Module] = []
        self._origins: dict[int, tuple[weakref.ref[Tensor], Output | str]] = {}

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow while the block runs."""
        with visits(self._enter, self._leave), self:
            yield

    def _enter(self, module: nn.Module, args: Any) -> None:
        if module in self._norms or is_convolutional(module):
            self._running.append(module)
            norm = self._norms.get(module)
            if norm is not None and norm.family == "frozen" and args:
                with torch._C.DisableTorchFunction():  # what we compute is none of the model's
                    self._take(module, args[0], Use(norm.kind, calling_site(), module), None)

    def _leave(self, module: nn.Module, *rest: Any) -> None:
        if self._running and self._running[-1] is module:
            self._running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            return func(*args, **kwargs)
        layer = self._running[-1] if self._running else None
        given = list(tensors_in((args, kwargs)))
        output = self._own_call(func, args, kwargs, layer)
        if output is None:
            self._note_uses(func, given, layer)
        result = func(*args, **kwargs)
        self._note_origin(result, _described(func, given) if output is None else output)
        return result

    def _own_call(
        self, func: Any, args: Any, kwargs: Any, layer: nn.Module | None
    ) -> Output | None:
        """Return the output to be, when the call is the layer's own convolution or norm."""
        if layer is None or needs_plain_ops():
            return None
        if layer in self._norms:
            kernel = kernel_of(func, args, kwargs)
            if kernel is None or kernel.arguments.get("running_mean") is None:
                return None
            self._take(layer, kernel.input, Use(_name(func), calling_site(), layer), kernel)
            shape = tuple(kernel.input.shape)
            output = Output(layer, shape, 0, True, kernel, _version(kernel.input))
        elif is_convolution(func):
            convolution = convolution_of(func, args, kwargs)
            if convolution is None:
                return None
            self._take(layer, convolution.x, Use(_name(func), calling_site(), layer), convolution)
            weight, bias = convolution.weight, convolution.bias
            own = weight is layer.weight and bias is layer.bias
            output = Output(layer, convolution.shape, weight.numel(), own, convolution)
        else:
            return None
        self.outputs.append(output)
        return output

    def _take(self, layer: nn.Module, x: object, use: Use, call: LayerCall | None) -> None:
        """Note that a layer takes x."""
        source = self._origin(x)
        if layer in self._norms:
            self.sources.setdefault(layer, []).append(source)
        if isinstance(source, Output):
            source.uses.append(use)
            if source.call is not None and _is_written(source):
                source.is_stale, source.call = True, None
            if self._on_link is not None and source.call is not None:
                self._on_link(source, use, call)
            source.call = None

    def _note_uses(self, func: Any, given: list[Tensor], layer: nn.Module | None) -> None:
        for tensor in given:
            source = self._origin(tensor)
            if isinstance(source, Output) and not self._is_inside_frozen(source, layer):
                source.uses.append(Use(_name(func), calling_site()))
                source.call = None
            owner = self._parameters.get(id(tensor))
            if owner is not None and owner is not layer:
                self.elsewhere.setdefault(owner, _name(func))

    def _is_inside_frozen(self, source: Output, layer: nn.Module | None) -> bool:
        """Tell whether a foreign frozen layer computes with what it has taken."""
        norm = None if layer is None else self._norms.get(layer)
        inside = norm is not None and norm.family == "frozen"
        return inside and any(use.by is layer for use in source.uses)

    def _origin(self, x: object) -> Output | str | None:
        reference, origin = self._origins.get(id(x), (None, None))
        return origin if reference is not None and reference() is x else None

    def _note_origin(self, result: Any, origin: Output | str) -> None:
        if isinstance(result, Tensor):
            before = self._origin(result)
            if isinstance(before, Output):  # written in place, or handed through
                return
            self._origins[id(result)] = weakref.ref(result), origin
        elif isinstance(result, list | tuple):
            for tensor in result:
                if isinstance(tensor, Tensor):
                    self._origins[id(tensor)] = weakref.ref(tensor), origin

    def mark_kept(self, output: object) -> None:
        """Mark what is in the model's output; what is stored elsewhere is found by `result`."""
        for tensor in tensors_in(output):
            if isinstance(source := self._origin(tensor), Output):
                source.is_kept = True

    def result(self) -> Links:
        """Return what was seen; what is alive now is kept by somebody."""
        for output in self.outputs:
            output.call = None  # of what nobody used: it keeps its input alive
        for reference, origin in self._origins.values():
            if isinstance(origin, Output) and reference() is not None:
                origin.is_kept = True
        sources = {layer: tuple(found) for layer, found in self.sources.items()}
        return Links(tuple(self.outputs), sources, self.elsewhere)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _is_written(output: Output) -> bool:
    """Tell whether what an output was made from has been written since."""
    if isinstance(output.call, Convolution):
        return not output.call.is_unchanged
    return output.call is not None and _version(output.call.input) != output.version


def _described(func: Any, given: list[Tensor]) -> str:
    """Name what made a tensor; of a convolution that cannot be followed with what it was given."""
    on = f" on an input {tuple(given[0].shape)}" if is_convolution(func) and given else ""
    return f"{_name(func)}{on}"


def _name(func: Any) -> str:
    """Name a function as users write it."""
    name = getattr(func, "__name__", None) or torch.overrides.resolve_name(func) or str(func)
    return str(name).strip("_")
