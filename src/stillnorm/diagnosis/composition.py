"""Does a sample's answer depend on its batch mates? Asked of the model itself."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.state import eval_mode, preserved
from stillnorm.tracing import call


def batch_dependence(evidence: Evidence) -> float | None:
    """Run the first batch whole and its first half alone, in eval mode; compare the shared samples.

    Returns:
        The root mean square difference, in standard deviations of the output; None where that
        cannot be measured: no batch, a batch of one, an output that is not one row per sample, or
        a model that cannot take half a batch.
    """
    if evidence.runs is None:
        return None
    batch, size = evidence.runs.batches[0], evidence.runs.batch_sizes[0]
    half = size // 2
    if half == 0:
        return None

    def first_half(value: object) -> object:
        return value[:half] if isinstance(value, Tensor) and value.shape[:1] == (size,) else value

    model, forward = evidence.model, evidence.runs.forward
    with preserved(model), torch.no_grad(), eval_mode(model):
        whole = _rows(call(model, batch, forward), size)
        try:
            alone = _rows(call(model, tree_map(first_half, batch), forward), half)
        except Exception:  # a model that insists on its batch size
            return None
    if whole is None or alone is None or whole[:half].shape != alone.shape:
        return None
    spread = whole.std().clamp_min(torch.finfo(whole.dtype).tiny)
    return float((whole[:half] - alone).square().mean().sqrt() / spread)


def _rows(output: object, n: int) -> Tensor | None:
    """Return the first float tensor in an output that has one row per sample."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[:1] == (n,):
            return leaf.double()
    return None
