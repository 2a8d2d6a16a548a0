"""Histograms of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stillnorm.reports import Histogram, Series

BINS = 48


def histogram(title: str, values: Mapping[str, Tensor]) -> Histogram:
    """Count the values of several tensors in bins over the range of them all.

    Args:
        title: What the values are.
        values: The tensors by label.
    """
    flat = {label: tensor.detach().flatten().float() for label, tensor in values.items()}
    low = min(float(tensor.min()) for tensor in flat.values())
    high = max(float(tensor.max()) for tensor in flat.values())
    edges = tuple(torch.linspace(low, high, BINS + 1).tolist())
    return Histogram(
        title,
        tuple(
            Series(label, edges, tuple(torch.histc(tensor, BINS, low, high).tolist()))
            for label, tensor in flat.items()
        ),
    )
