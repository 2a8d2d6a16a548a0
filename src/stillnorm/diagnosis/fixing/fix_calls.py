"""The line of Python that does what a fix does, where one public call is enough."""

from __future__ import annotations

from collections.abc import Sequence

from stillnorm.diagnosis.finding import Action, Fix
from stillnorm.norms import NormLayer

MOST_PATHS = 24  # a longer list is not a line that anybody reads: `report.fix` has it

_CALLS: dict[Action, str] = {
    "clone": "sn.repair.clone_inference_tensors(model{layers})",
    "drop gradients": "sn.repair.drop_stale_gradients(model{layers})",
    "replace": "sn.replace(model, {option}{layers})",
    "float32": "sn.repair.to_float32(model{layers})",
    "convert": "sn.repair.convert_variance(model, {option}{layers})",
    "absorb": "sn.repair.absorb_bias(model, batch)",
    "track": "sn.track_statistics(model, batches{layers})",
    "split": "sn.split_shared(model, batches{layers})",
    "recalibrate": "sn.recalibrate(model, batches{layers})",
    "recalibrate and freeze": "sn.recalibrate(model, batches{layers}); "
    "sn.freeze(model{layers}{affine})",
    "freeze": "sn.freeze(model{layers}{affine})",
}


def call_of(fix: Fix, layers: Sequence[NormLayer]) -> str:
    """Return the call, or that of `report.fix` where it takes more than one.

    Args:
        fix: The fix.
        layers: All norm layers of the model.

    Example:
        >>> call_of(Fix("hold the statistics", "safe", "freeze", ("a", "b")), ())
        'report.fix()'
        >>> from torch import nn
        >>> from stillnorm.norms import find_norms
        >>> norms = find_norms(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
        >>> call_of(Fix("estimate the statistics", "unsafe", "recalibrate", ("1",)), norms)
        "sn.recalibrate(model, batches, '1')"
    """
    whole = "report.fix(unsafe=True)" if fix.applicability == "unsafe" else "report.fix()"
    named = {path: layer for layer in layers for path in layer.paths}
    if fix.action not in _CALLS or not set(fix.paths) <= named.keys():
        return whole
    chosen = [named[path] for path in fix.paths]
    estimates = fix.action in ("recalibrate", "recalibrate and freeze")
    if estimates and any(layer.hold is not None for layer in chosen):
        return whole  # it takes an unfreeze before and a freeze after
    affine = {layer.trains_affine for layer in chosen}
    everything = {layer.path for layer in chosen} == {layer.path for layer in layers}
    selector = "" if everything else _selector(fix.paths)
    if (len(affine) > 1 and "freeze" in fix.action) or selector is None:
        return whole
    return _CALLS[fix.action].format(
        layers=selector,
        option=repr(fix.option),
        affine=', affine="trains"' if True in affine else "",
    )


def _selector(paths: Sequence[str]) -> str | None:
    """Write the argument that selects exactly these layers; None where no short one does."""
    if len(paths) > MOST_PATHS or any(set("*?[`\n") & set(path) or not path for path in paths):
        return None
    return f", {paths[0]!r}" if len(paths) == 1 else f", {list(paths)!r}"
