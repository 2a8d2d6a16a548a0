"""What the norms hand on, before their affine part: histograms of the first batch.

They take one more forward in each of two flows, which is made only when somebody wants to see them:
the batch flow, where a layer normalises as in training, and the eval flow, which is what ships.
A forward that does not see what `check` saw belongs to another model, and is not shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.errors import StillnormError
from stillnorm.norms import NormalizesBy, NormLayer
from stillnorm.tracing import Call, Normalization, read, running, tensors_in, visits

REACH, BINS = 6.0, 48  # standard deviations to either side
WHOLE = 10_000  # counts are parts of this
MOST_VALUES = 2**18  # of one call; more are thinned evenly over the positions
SAME = 1e-3  # relative: what the same forward may differ by

Seen = Literal["batch", "eval"]
FLOWS: tuple[Seen, Seen] = ("batch", "eval")


@dataclass(frozen=True)
class Spread:
    """How the values of a layer are distributed after it has normalised them.

    Args:
        used: The statistics that it normalised by.
        counts: Per bin from -6 to 6, parts in ten thousand of all values.
        outside: Parts in ten thousand beyond.
    """

    used: NormalizesBy
    counts: tuple[int, ...]
    outside: int


def normalized_values(evidence: Evidence) -> tuple[dict[tuple[str, Seen], Spread], str]:
    """Run the first batch and count; the model is left as it was.

    Returns:
        By layer and flow; and why there are none, if there are none.
    """
    if evidence.runs is None:
        return {}, "needs batches"
    found: dict[tuple[str, Seen], Spread] = {}
    try:
        for flow in FLOWS:
            counted = _run(evidence, flow)
            if counted is None:
                return {}, "the model has changed since it was checked"
            found |= {(path, flow): spread for path, spread in counted.items()}
    except StillnormError as error:
        return {}, error.fact
    return found, ""


def _run(evidence: Evidence, flow: Seen) -> dict[str, Spread] | None:
    """Count in one flow; None when the forward does not see what `check` saw."""
    runs = evidence.measured
    expected = [call for call in runs.traces[flow].calls if call.batch == 0]
    used = {call.path: call.used for call in expected}
    counts: dict[str, Tensor] = {}
    with running(evidence.model, forward=runs.forward, flow=flow) as run:
        layers = {layer.module: layer for layer in run.norms}

        def enter(module: nn.Module, args: Any) -> None:
            layer = layers.get(module)
            x = next(tensors_in(args), None)
            if layer is None or x is None or layer.path not in used:
                return
            with torch._C.DisableTorchFunction():  # what we compute is none of the model's
                values = _normalized(layer, x, used[layer.path])
                if values is not None:
                    counts[layer.path] = counts.get(layer.path, 0) + _count(values)

        with visits(enter, lambda *_: None):
            _, seen = run(runs.batches[0])
    if not _same(seen, expected):
        return None
    return {path: _spread(used[path], n) for path, n in counts.items() if n.sum() > 0}


def _normalized(layer: NormLayer, x: Tensor, used: NormalizesBy) -> Tensor | None:
    """Return (x - mean) / sqrt(var + eps), (N, C, S), by the statistics that the layer uses."""
    if x.dim() < 2 or x.numel() == 0 or x.shape[1] != layer.num_features:
        return None
    x = x.detach().flatten(2) if x.dim() > 2 else x.detach().unsqueeze(2)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, var = layer.running_mean, layer.running_var
    if used == "running":
        if mean is None or var is None:
            return None
        mean, var = mean.detach()[:, None], var.detach()[:, None]
    else:
        over = (0, 2) if used == "batch" else (2,)
        var, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    every = max(1, x.numel() // MOST_VALUES)
    return (x[:, :, ::every] - mean) / (var + layer.eps).sqrt()


def _count(values: Tensor) -> Tensor:
    """Count per bin, and last what lies outside; what is not a number is not counted."""
    values = values[values.isfinite()].float().cpu()
    inside = torch.histc(values, BINS, -REACH, REACH)
    return torch.cat((inside, (values.numel() - inside.sum()).reshape(1)))


def _spread(used: NormalizesBy, counts: Tensor) -> Spread:
    parts = (WHOLE * counts.double() / counts.sum()).round().int().tolist()
    return Spread(used, tuple(parts[:-1]), parts[-1])


def _same(seen: list[Normalization], expected: list[Call]) -> bool:
    """Tell whether the same layers received the same values."""
    if [one.layer.path for one in seen] != [call.path for call in expected]:
        return False
    for one, call in zip(seen, expected, strict=True):
        mean, var = read(one.moments)
        if mean.shape != call.sample_mean.shape:
            return False
        scale = (call.sample_var + call.sample_mean.square()).sqrt() + 1e-12
        off = torch.maximum((mean - call.sample_mean) / scale, (var - call.sample_var) / scale**2)
        if bool((off.nan_to_num(0).abs() > SAME).any()):
            return False
    return True
