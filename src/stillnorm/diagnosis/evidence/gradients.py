"""What do some parameters feed? Asked of autograd, without paying for a backward."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from stillnorm.diagnosis.evidence.runs import Runs
from stillnorm.state import eval_mode, preserved
from stillnorm.tracing import call, copied, strangers_kept


def fed_by(
    model: nn.Module, runs: Runs, parameters: Collection[nn.Parameter]
) -> frozenset[nn.Module] | None:
    """Run the first batch in eval mode with gradients to these parameters only.

    What autograd would save for backward is dropped at once, so this takes the memory of a forward
    without gradients.

    Returns:
        The modules whose input depends on the parameters; None when the model or the user's
        `forward` switches gradients off, so that nothing can be seen.
    """
    chosen = {id(parameter) for parameter in parameters}
    fed: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple[object, ...]) -> None:
        if _carries_gradient(args):
            fed.add(module)

    with preserved(model), strangers_kept(model), eval_mode(model), torch.enable_grad():
        for parameter in model.parameters():
            if not parameter.is_inference():
                parameter.requires_grad_(parameter.is_floating_point() and id(parameter) in chosen)
        noted = register_module_forward_pre_hook(note)
        try:
            with saved_tensors_hooks(_drop, _drop):
                output = call(model, copied(runs.batches[0]), runs.forward)
        finally:
            noted.remove()
    return frozenset(fed) if _carries_gradient(output) else None


def _carries_gradient(value: object) -> bool:
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(value))


def _drop(saved: Tensor) -> Tensor:
    """Let go of what autograd saves: nobody runs backward."""
    return saved.new_empty(0)
