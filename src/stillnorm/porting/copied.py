"""The torch model in another precision: what its own rounding is."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillnorm.porting.example import each
from stillnorm.porting.rounding import FLOAT32, precision
from stillnorm.porting.step import Moments, forward_in_training, moments, start_from_zero
from stillnorm.porting.torch_layers import parts_of
from stillnorm.state import eval_mode
from stillnorm.tracing import call_example


@dataclass(frozen=True)
class Copy:
    """What a copy of a torch model in another precision computes.

    Args:
        output: Its output in eval mode.
        statistics: By path, those of its norms after one forward in train mode, from zero; empty
            where it does not run so.
    """

    output: Any
    statistics: Mapping[str, Moments]

    @classmethod
    def of(cls, model: nn.Module, given: object, learning: Iterable[str]) -> Copy | None:
        """Copy a model and run it; None where it does not copy, or does not run so."""
        fine = precision([*model.parameters(), *model.buffers()]) < FLOAT32
        dtype = torch.float32 if fine else torch.float64

        def cast(value: Tensor) -> Tensor:
            return value.to(dtype) if value.is_floating_point() else value.clone()

        try:
            twin = copy.deepcopy(model)
            if _shares(twin, model):
                return None
            twin.to(dtype)
            with eval_mode(twin):
                output = call_example(twin, each(given, cast))
        except Exception:  # whatever a model raises that was written for float32
            return None
        paths = set(learning)
        norms = [part for part in parts_of(twin)[0] if part.path in paths]
        for part in norms:
            start_from_zero(part)
        statistics: dict[str, Moments] = {}
        with suppress(Exception):
            if not forward_in_training(twin, each(given, cast)):
                statistics = {part.path: moments(part.tensors().get) for part in norms}
        return cls(output, statistics)


def _shares(twin: nn.Module, model: nn.Module) -> bool:
    """Tell whether a copy has tensors of the model itself: its class says how it is copied."""
    ours = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return any(id(tensor) in ours for tensor in (*twin.parameters(), *twin.buffers()))
