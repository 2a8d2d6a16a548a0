"""Context managers after which a model is as it was: `eval_mode`, `no_updates`, `preserved`.

Modes are kept per module and not as one flag of the root: a frozen layer inside a model in train
mode is the very thing that `model.eval(); ...; model.train()` destroys.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from stillnorm.norms import Layers, hold_of, keep_tensors, select


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Run the block in eval mode; afterwards every module has the mode that it had.

    The cure for the plotting or validation block in the middle of a training loop, after which
    `model.train()` would thaw what was frozen. Nests, and survives exceptions and modules that are
    added or removed inside.

    Args:
        model: The model.

    Yields:
        The model, in eval mode.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
        >>> _ = net[1].eval()
        >>> with eval_mode(net):
        ...     net.training
        False
        >>> net.training, net[1].training
        (True, False)
    """
    with _modes_kept(model):
        model.eval()
        yield model


@contextlib.contextmanager
def no_updates(model: nn.Module, layers: Layers = None) -> Iterator[nn.Module]:
    """Normalise as before and update no statistics inside the block.

    For the second forward of SAM, VAT and adversarial attacks, for teachers, profilers and summary
    tools: whatever runs in train mode inside leaves `running_mean`, `running_var` and
    `num_batches_tracked` as they are, whereas momentum 0 still counts batches and lets one
    infinity in the batch through (0 * inf is NaN).

    Args:
        model: The model.
        layers: Which layers; see `select`.

    Yields:
        The model.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with no_updates(net):
        ...     _ = net(torch.randn(8, 2))
        >>> int(net.num_batches_tracked)
        0
    """
    chosen = [norm.module for norm in select(model, layers) if norm.has_statistics]
    # With track_running_stats off and buffers present, torch's batch norms normalise by the batch
    # in train mode, by the running statistics in eval mode, and write nothing in either.
    switched = [m for m in chosen if isinstance(m, _BatchNorm) and m.track_running_stats]
    # Any other forward (instance norm, a subclass with its own) may write: keep the values.
    silent = (_BatchNorm.forward, SyncBatchNorm.forward)
    others = [m for m in chosen if type(m).forward not in silent]
    statistics = [
        tensor
        for module in others
        for name in ("running_mean", "running_var", "num_batches_tracked")
        if isinstance(tensor := getattr(module, name, None), Tensor)
    ]
    with keep_tensors(statistics):
        for module in switched:
            module.track_running_stats = False
        try:
            yield model
        finally:
            for module in switched:
                module.track_running_stats = True


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[nn.Module]:
    """Let anything happen inside the block; afterwards the model is as it came.

    Kept are the mode of every module, all buffers and the affine parameters of norm layers (values
    and version counters), momentum and the other settings of norm layers, hooks, `requires_grad`
    and `.grad` of every parameter, and the global random states. Other parameters are not copied:
    an optimizer step inside the block stays.

    Args:
        model: The model.

    Yields:
        The model.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> with preserved(net):
        ...     _ = net.eval()
        ...     net[1].momentum = None
        >>> net.training, net[1].momentum
        (True, 0.1)
    """
    norms = select(model)
    tensors = [*model.buffers(), *(t for norm in norms for t in norm.tensors().values())]
    with (
        _random_kept(),
        _gradients_kept(model),
        keep_tensors(tensors),
        _settings_kept([norm.module for norm in norms]),
        _hooks_kept(model),
        _modes_kept(model),
    ):
        yield model


# ---------------------------------------------------------------------- the single things kept


@contextlib.contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    """Keep `training` of every module, and what held layers have been asked for."""
    flags = [(module, module.training) for module in model.modules()]
    holds = [(hold, hold.asked) for module, _ in flags if (hold := hold_of(module)) is not None]
    try:
        yield
    finally:
        for module, training in flags:
            # The attribute, not train(): overrides of train() would set other modules' modes.
            module.training = training
        for hold, asked in holds:
            hold.asked = asked


_SETTINGS = ("eps", "momentum", "affine", "track_running_stats")


@contextlib.contextmanager
def _settings_kept(modules: list[nn.Module]) -> Iterator[None]:
    kept = [
        (module, name, module.__dict__[name])
        for module in modules
        for name in _SETTINGS
        if name in module.__dict__
    ]
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)


@contextlib.contextmanager
def _hooks_kept(model: nn.Module) -> Iterator[None]:
    """Keep every hook dictionary: the same object with the same hooks in the same order."""
    kept = [
        (value, dict(value))
        for module in model.modules()
        for name, value in module.__dict__.items()
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
        and isinstance(value, dict)
    ]
    try:
        yield
    finally:
        for hooks, before in kept:
            if list(hooks.items()) != list(before.items()):
                hooks.clear()
                hooks.update(before)


@contextlib.contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Keep `requires_grad` and `.grad` of every parameter: the same tensors, with their values."""
    kept = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with keep_tensors([grad for _, _, grad in kept if grad is not None]):
        try:
            yield
        finally:
            for parameter, required, grad in kept:
                parameter.requires_grad_(required)
                parameter.grad = grad


@contextlib.contextmanager
def _random_kept() -> Iterator[None]:
    """Keep the random states of torch (every device in use), Python and, where loaded, NumPy."""
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=list(cuda)):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
