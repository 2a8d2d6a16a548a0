"""What `recalibrate` would give each layer, from a trace of the batch flow: no further forward."""

from __future__ import annotations

from functools import reduce

from torch import Tensor, nn

from stillnorm.calibration.moments import Moments, average, pool
from stillnorm.calibration.pool import statistics_of
from stillnorm.calibration.targets import find_targets
from stillnorm.norms import NormLayer
from stillnorm.tracing import Call, Trace


def traced_statistics(model: nn.Module, seen: Trace) -> dict[NormLayer, tuple[Tensor, Tensor]]:
    """Pool what each layer that is not held received.

    Args:
        model: The model, as it was when it was traced.
        seen: Its trace in the batch flow.

    Returns:
        Mean and variance in the dtype of the buffers. Nothing where a layer received NaN, infinity
        or what its buffers cannot hold: `recalibrate` would refuse to go on.
    """
    calls: dict[str, list[Call]] = {}
    for call in seen.calls:
        calls.setdefault(call.path, []).append(call)
    found: dict[NormLayer, tuple[Tensor, Tensor]] = {}
    for layer in find_targets(model, None).chosen:
        moments = _pooled(layer, calls.get(layer.path, []))
        if moments is None or not moments.has_variance:
            continue
        tensors, new = layer.tensors(), statistics_of(layer, moments)
        mean, var = (new[name].to(tensors[name]) for name in ("running_mean", "running_var"))
        if not all(tensor.isfinite().all() for tensor in (mean, var)):
            return {}
        found[layer] = mean, var
    return found


def _pooled(layer: NormLayer, calls: list[Call]) -> Moments | None:
    """Return the moments of all calls together; None where none tells a variance, or has a mask."""
    if any(call.masked for call in calls):
        return None
    convention, least = (average, 2) if layer.family == "instance" else (pool, 1)
    parts = [
        convention(call.sample_mean, call.sample_var, call.values)
        for call in calls
        if call.values >= least * call.samples > 0
    ]
    return reduce(Moments.merge, parts) if parts else None
