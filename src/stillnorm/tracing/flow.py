"""Running a model under instruments, batch by batch, in the modes that an investigation needs.

eval    the whole model in eval mode
batch   the same, but every norm that would not normalise by its running statistics in train mode
        does as it would in train mode; dropout stays off
as_is   the model's present modes

In none of them is anything updated, and the model is left as it was found.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Collection, Iterator
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parallel import DistributedDataParallel

from stillnorm.errors import BatchError, StateError, StillnormError
from stillnorm.norms import NormLayer, find_norms, probe_modes, walk
from stillnorm.norms.adapters.keras import normalizing_by_batch
from stillnorm.state import no_updates, preserved
from stillnorm.tracing.batches import copied, first_line
from stillnorm.tracing.calling import Forward, call
from stillnorm.tracing.instrument import Instrument, Normalization, Stray
from stillnorm.tracing.measures import Measure, by_samples
from stillnorm.tracing.strangers import strangers_kept

Flow = Literal["eval", "batch", "as_is"]


class Run:
    """A model under instruments; call it once per batch.

    Args:
        model: The model.
        norms: The norms to watch.
        by_batch: Those of them that are in train mode for the sake of batch statistics.
        forward: How to call the model; see `call`.
        measure: How to measure what is normalised.
    """

    def __init__(
        self,
        model: nn.Module,
        norms: Collection[NormLayer],
        by_batch: Collection[NormLayer],
        forward: Forward | None,
        measure: Measure,
    ) -> None:
        self.norms = norms
        self.batches = 0
        self.seen: list[Normalization] = []
        self.strays: list[Stray] = []
        self._model = model
        self._by_batch = by_batch
        self._forward = forward
        self._measure = measure

    def __call__(self, batch: object) -> tuple[object, list[Normalization]]:
        """Run one batch.

        Returns:
            The model's output, and what its norm layers normalised, in order.

        Raises:
            BatchError: The batch does not fit, or the forward raised. Names batch and layer.
        """
        instrument = Instrument(self.norms, self._by_batch, self._measure)
        self.seen, self.strays = instrument.seen, instrument.strays
        try:
            with instrument.watching():
                output = call(self._model, copied(batch), self._forward)  # models write to it
        except StillnormError as error:
            raise type(error)(f"batch {self.batches}: {error.fact}", help=error.help) from error
        except Exception as error:
            raise BatchError(
                f"batch {self.batches}: the forward raised{_where(instrument, error)} "
                f"{first_line(error)}",
                help="nothing was changed; the error above has the line",
            ) from error
        self.batches += 1
        return output, instrument.seen


@contextlib.contextmanager
def running(
    model: nn.Module,
    *,
    forward: Forward | None = None,
    flow: Flow = "eval",
    by_batch: Collection[NormLayer] | None = None,
    measure: Measure = by_samples,
) -> Iterator[Run]:
    """Put a model under instruments.

    Args:
        model: The model.
        forward: How to call it on a batch; see `call`.
        flow: The modes to run in.
        by_batch: With flow "batch": the norms that do as in train mode. Default: all that nothing
            holds.
        measure: How to measure what is normalised.

    Yields:
        The run, to be called on each batch.

    Raises:
        StateError: The model has lazy modules, which a first forward would change.
    """
    norms = find_norms(model)
    if flow != "batch":
        by_batch = ()
    elif by_batch is None:
        by_batch = train_by_input(model, norms)
    with looking(model), strangers_kept(model):
        if flow != "as_is":
            model.eval()
        with training_by_input(by_batch):
            yield Run(model, norms, by_batch, forward, measure)


@contextlib.contextmanager
def training_by_input(layers: Collection[NormLayer]) -> Iterator[None]:
    """Set the layers to normalise by their input, as in train mode.

    The attribute, not `train()`: overrides of that would set other modules' modes. A SyncBatchNorm
    in train mode would wait for the other ranks; the instrument lets it normalise by its own batch.
    """
    modules = [layer.module for layer in layers if not isinstance(layer.module, nn.SyncBatchNorm)]
    before = [module.training for module in modules]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            if layer.family == "keras":
                stack.enter_context(normalizing_by_batch(layer.module))
        try:
            for module in modules:
                module.training = True
            yield
        finally:
            for module, training in zip(modules, before, strict=True):
                module.training = training


@contextlib.contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Let the block run the model in any way: nothing is updated, and all is left as found.

    Norms that are not registered in the model need `strangers_kept` too: it would keep the held
    layers that are folded from doing so.

    Raises:
        StateError: The model has lazy modules, which a first forward would change.
    """
    _refuse_lazy(model)
    with preserved(model), no_updates(model), torch.no_grad(), eager(), _alone(model):
        try:
            yield
        finally:
            _reshard(model)


@contextlib.contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Let data-parallel wrappers run on this rank alone: they send buffers before a forward."""
    wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
    before = [wrapper.require_forward_param_sync for wrapper in wrappers]
    try:
        for wrapper in wrappers:
            wrapper.require_forward_param_sync = False
        yield
    finally:
        for wrapper, sync in zip(wrappers, before, strict=True):
            wrapper.require_forward_param_sync = sync


def _reshard(model: nn.Module) -> None:
    """Give back the weights that `fully_shard` gathers in forward and keeps for a backward."""
    for module in model.modules():
        if _is_unit(module):
            module.reshard()  # type: ignore[operator]


def is_sharded(model: nn.Module) -> bool:
    """Tell whether `fully_shard` has distributed weights of the model over ranks."""
    return any(map(_is_unit, model.modules()))


def _is_unit(module: nn.Module) -> bool:
    return any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__)


def train_by_input(model: nn.Module, norms: Collection[NormLayer]) -> tuple[NormLayer, ...]:
    """Return the norms that `model.train()` would leave normalising by their input."""
    in_train = probe_modes(model).in_train
    return tuple(
        layer
        for layer in norms
        if in_train[layer.module] and layer.normalizes_by(training=True) != "running"
    )


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run compiled code as written, where the hooks fire, and without its warning about them."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using `torch.compile", UserWarning)
        yield


def _refuse_lazy(model: nn.Module) -> None:
    for path, module, _ in walk(model):
        if isinstance(module, LazyModuleMixin) and (
            module.cls_to_become is not None or module.has_uninitialized_params()
        ):
            raise StateError(
                f"{path} is a {type(module).__name__}: its first forward would change the model",
                help="call the model once on a batch first",
            )


def _where(instrument: Instrument, error: Exception) -> str:
    """Say in which norm layer the error was raised, or after which."""
    if instrument.failed is not None and instrument.failed[0] is error:
        return f" in {instrument.failed[1].path}:"
    if instrument.seen:
        return f" after {instrument.seen[-1].layer.path}:"
    return ""
