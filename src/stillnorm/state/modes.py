"""Context managers after which a model is as it was: `eval_mode`, `no_updates`, `preserved`.

Modes are kept per module and not as one flag of the root: a frozen layer inside a model in train
mode is the very thing that `model.eval(); ...; model.train()` destroys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from stillnorm.holding.folding import is_convolutional
from stillnorm.norms import (
    Layers,
    NormLayer,
    every_module,
    keep_tensors,
    keep_types,
    overrides_train,
    random_kept,
    select,
)
from stillnorm.norms.adapters import keras
from stillnorm.state.kept import (
    buffers_kept,
    gradients_kept,
    hooks_kept,
    layers_kept,
    lazies_kept,
    modes_kept,
    trainable_kept,
)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Run the block in eval mode; afterwards every module has the mode that it had.

    The cure for the plotting or validation block in the middle of a training loop, after which
    `model.train()` would thaw what was frozen. Nests, and survives exceptions and modules that are
    added or removed inside. A `train()` of the model's own is called on the way in and out.

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
    with modes_kept(model):
        model.eval()
        yield model


@contextlib.contextmanager
def no_updates(model: nn.Module, layers: Layers = None) -> Iterator[nn.Module]:
    """Normalise as before and update no statistics inside the block.

    For the second forward of SAM, VAT and adversarial attacks, for teachers, profilers and summary
    tools: whatever runs in train mode inside leaves `running_mean`, `running_var` and
    `num_batches_tracked` as they are, whereas momentum 0 still counts batches and lets one
    infinity in the batch through (0 * inf is NaN). Activation checkpointing runs the forward again
    in backward: then `backward()` belongs into the block, too.

    Args:
        model: The model.
        layers: Which layers; see `select`.

    Yields:
        The model.

    Raises:
        SelectorError: `layers` matches nothing.

    Cost:
        Nothing for torch's own batch norms; for instance norms and layers with a forward of their
        own one copy of the statistics.

    Example:
        >>> import torch
        >>> net = nn.BatchNorm1d(2)
        >>> with no_updates(net):
        ...     _ = net(torch.randn(8, 2))
        >>> int(net.num_batches_tracked)
        0
    """
    chosen = [norm for norm in select(model, layers) if norm.has_statistics]
    lazy = [norm for norm in chosen if norm.is_lazy]
    modules = [norm.module for norm in chosen if not norm.is_lazy]
    # With track_running_stats off and buffers present, torch's batch norms normalise by the batch
    # in train mode, by the running statistics in eval mode, and write nothing in either.
    switched = [m for m in modules if isinstance(m, _BatchNorm) and m.track_running_stats]
    # Any other forward (instance norm, a subclass with its own) may write: keep the values.
    silent = (_BatchNorm.forward, SyncBatchNorm.forward)
    loud = [norm for norm in chosen if not norm.is_lazy and _forward(norm.module) not in silent]
    others = [norm.module for norm in loud]
    with keep_tensors(_statistics(loud)), buffers_kept(others):
        try:
            for module in switched:
                module.track_running_stats = False
            yield model
        finally:
            for module in switched:
                module.track_running_stats = True
            for norm in lazy:
                if not norm.is_lazy:  # its first forward was inside
                    norm.module.reset_running_stats()  # type: ignore[operator]


def _forward(module: nn.Module) -> object:
    return getattr(type(module), "forward", None)


def _statistics(norms: list[NormLayer]) -> list[Tensor]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    of_keras = [norm.module for norm in norms if norm.family == "keras"]
    return [
        *(tensor for norm in norms for k, tensor in norm.tensors().items() if k in names),
        *(variable.value for variable in keras.state_of(of_keras)),
    ]


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[nn.Module]:
    """Let anything happen inside the block; afterwards the model is as it came.

    Kept are

    - of every module: mode, hooks, which tensors are its buffers, and whether it is lazy;
    - of norm layers: class, hold, momentum and every other attribute;
    - of tensors: all buffers and the affine parameters of norm layers (objects, bits and version
      counters), dtype and device of all parameters, `requires_grad` and `.grad`;
    - the global random states of torch, Python and NumPy.

    Other parameters are not copied: an optimizer step inside the block stays. So do attributes of
    the user's own modules, and modules added or removed.

    Args:
        model: The model.

    Yields:
        The model.

    Cost:
        One copy of all buffers and gradients.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        >>> with preserved(net):
        ...     _ = net.eval()
        ...     net[1].momentum = None
        >>> net.training, net[1].momentum
        (True, 0.1)
    """
    norms = select(model)
    modules, parameters = every_module(model), list(model.parameters())
    # The innermost is put back first: modes by the model's own train(), which may compute with
    # parameters and buffers; then which tensors these are; then their values.
    with (
        random_kept(),
        gradients_kept(model),
        keep_tensors(
            [
                *model.buffers(),
                *(variable.value for variable in keras.state_of(modules)),
                *(tensor for norm in norms for tensor in norm.tensors().values()),
                *(tensor for module in modules for tensor in _touched_by_train(module)),
            ]
        ),
        layers_kept([norm.module for norm in norms if not norm.is_lazy]),
        layers_kept(
            [m for m in modules if is_convolutional(m) and not isinstance(m, LazyModuleMixin)]
        ),
        lazies_kept(model),
        hooks_kept(model),
        buffers_kept(modules),
        keep_types([*parameters, *(p.grad for p in parameters if p.grad is not None)]),
        modes_kept(model),
        trainable_kept(modules),
    ):
        yield model


def _touched_by_train(module: nn.Module) -> list[Tensor]:
    """Return the parameters that a `train()` of the module's own may write (LoRA merges)."""
    return list(module.parameters(recurse=False)) if overrides_train(module) else []
