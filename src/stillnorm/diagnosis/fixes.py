"""Applying fixes: all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack

from torch import nn

from stillnorm.calibration import recalibrate
from stillnorm.diagnosis.finding import Fix
from stillnorm.errors import StateError
from stillnorm.freezing import freeze, unfreeze
from stillnorm.norms import NormLayer, find_norms
from stillnorm.norms.hold import Affine
from stillnorm.tracing import Forward


def apply_all(
    fixes: Iterable[Fix],
    model: nn.Module,
    batches: tuple[object, ...],
    forward: Forward | None,
) -> Callable[[], None]:
    """Apply fixes: statistics first, then momentum, then holds, so that holds keep what is right.

    Returns:
        What takes it all back.

    Raises:
        StateError: A layer that a fix names is no longer there, or cannot be changed. Nothing was.
    """
    fixes = tuple(fixes)
    layers = {layer.path: layer for layer in find_norms(model)}

    def named(*actions: str) -> list[NormLayer]:
        paths = dict.fromkeys(path for fix in fixes if fix.action in actions for path in fix.paths)
        if missing := [path for path in paths if path not in layers]:
            raise StateError(f"the model has no norm layer {missing[0]!r} any more")
        return [layers[path] for path in paths]

    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    stale = named("recalibrate", "recalibrate and freeze")
    turned = named("momentum")
    loose = named("freeze", "recalibrate and freeze")
    undo = ExitStack()
    try:
        if stale:
            _recalibrate(model, stale, batches, forward, undo)
        for layer in turned:
            _turn_momentum(layer, undo)
        _hold(model, {layer: _declared(layer) for layer in loose if layer.hold is None}, undo)
    except BaseException:
        undo.close()
        for parameter, grad in gradients:
            parameter.grad = grad
        raise
    return undo.close


def _recalibrate(
    model: nn.Module,
    layers: list[NormLayer],
    batches: tuple[object, ...],
    forward: Forward | None,
    undo: ExitStack,
) -> None:
    """Estimate the statistics of the layers; those that stillnorm holds are held again after."""
    held = {layer: _declared(layer) for layer in layers if layer.hold is not None}
    _release(model, held, undo)
    modules = [layer.module for layer in layers]
    report = recalibrate(model, iter(batches), modules, forward=forward, group="self")
    undo.callback(report.undo)
    done = {layer.path for layer in report.layers}
    if left := [layer.path for layer in layers if layer.path not in done]:
        raise StateError(
            f"the statistics of {left[0]} cannot be estimated from the batches given to check",
            help="sn.recalibrate(model, batches) tells the reason",
        )
    _hold(model, held, undo)


def _declared(layer: NormLayer) -> Affine:
    """Return what the layer's own flags say of its affine parameters."""
    return "trains" if layer.trains_affine else "frozen"


def _hold(model: nn.Module, layers: Mapping[NormLayer, Affine], undo: ExitStack) -> None:
    for layer, affine in layers.items():
        freeze(model, layer.module, affine=affine, strict=True)
        undo.callback(unfreeze, model, layer.module)


def _release(model: nn.Module, layers: Mapping[NormLayer, Affine], undo: ExitStack) -> None:
    for layer, affine in layers.items():
        unfreeze(model, layer.module)
        undo.callback(freeze, model, layer.module, affine=affine)


def _turn_momentum(layer: NormLayer, undo: ExitStack) -> None:
    """Set momentum m to 1 - m, rounded as people write it."""
    before = layer.momentum
    if before is None:
        raise StateError(f"{layer.path} has no momentum any more")
    undo.callback(setattr, layer.module, "momentum", before)
    setattr(layer.module, "momentum", round(1 - before, 9))  # noqa: B010
