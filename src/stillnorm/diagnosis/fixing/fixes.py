"""Applying fixes: all of them or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import nn

from stillnorm.calibration import recalibrate
from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.peers import Peers
from stillnorm.diagnosis.finding import Action, Fix
from stillnorm.errors import StateError
from stillnorm.freezing import freeze, unfreeze
from stillnorm.norms import NormLayer, find_norms
from stillnorm.norms.hold import Affine
from stillnorm.norms.tensors import write
from stillnorm.repair import (
    absorb_bias,
    clone_inference_tensors,
    convert_variance,
    drop_stale_gradients,
    replace,
    split_shared,
    to_float32,
    track_statistics,
)
from stillnorm.tracing import Forward, call


def apply_all(fixes: Iterable[Fix], evidence: Evidence) -> Callable[[], None]:
    """Apply fixes in the order of `_ACTIONS`: structure first, then statistics, then holds.

    Returns:
        What takes it all back.

    Raises:
        StateError: A layer that a fix names is no longer there, or cannot be changed. Nothing was.
    """
    work = _Work(
        evidence.model,
        () if evidence.runs is None else evidence.runs.batches,
        evidence.request.forward,
        evidence.request.peers,
    )
    fixes = tuple(fixes)
    missing = {path for fix in fixes for path in fix.paths} - {
        path for layer in find_norms(work.model) for path in layer.paths
    }
    if missing:
        raise StateError(f"the model has no norm layer {min(missing)!r} any more")
    gradients = [(parameter, parameter.grad) for parameter in work.model.parameters()]
    try:
        for action, apply in _ACTIONS.items():
            for option, paths in _merged(fix for fix in fixes if fix.action == action).items():
                apply(work, work.layers(paths), option)
    except BaseException:
        work.undo.close()
        for parameter, grad in gradients:
            parameter.grad = grad
        raise
    return work.undo.close


def can_be_done(fix: Fix, layers: Iterable[NormLayer]) -> bool:
    """Tell whether a fix is one for the layers that it names: Keras' are of another make."""
    keras = {layer.path for layer in layers if layer.family == "keras"}
    return fix.action in _OF_ANY_MAKE or keras.isdisjoint(fix.paths)


_OF_ANY_MAKE = ("recalibrate", "recalibrate and freeze", "freeze")

Option = str | float | None


def _merged(fixes: Iterable[Fix]) -> dict[Option, tuple[str, ...]]:
    """Return the paths of all fixes that are told the same, so that they are changed in one go."""
    paths: dict[Option, dict[str, None]] = {}
    for fix in fixes:
        paths.setdefault(fix.option, {}).update(dict.fromkeys(fix.paths))
    return {option: tuple(found) for option, found in paths.items()}


@dataclass(frozen=True, eq=False)
class _Work:
    """What fixes work on, and what takes back what they have done."""

    model: nn.Module
    batches: tuple[object, ...]
    forward: Forward | None
    peers: Peers | None = None
    undo: ExitStack = field(default_factory=ExitStack)

    def layers(self, paths: Iterable[str]) -> list[NormLayer]:
        """Return the layers at the paths; of a layer that a fix has split, what it became."""
        layers = find_norms(self.model)
        named = {path: layer for layer in layers for path in layer.paths}
        found: dict[NormLayer, None] = {}
        for path in paths:
            inside = [layer for layer in layers if layer.path.startswith(f"{path}.")]
            found |= dict.fromkeys([named[path]] if path in named else inside)
        return list(found)


def _modules(layers: Iterable[NormLayer]) -> list[nn.Module]:
    return [layer.module for layer in layers]


def _whole(refused: Iterable[tuple[str, str]], layers: Sequence[NormLayer]) -> None:
    """Raise when an operation left one of the layers alone: a fix is whole or not at all."""
    paths = {layer.path for layer in layers}
    for path, reason in refused:
        if path in paths:
            raise StateError(f"{path} cannot be changed: {reason}")


def _clone(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    report = clone_inference_tensors(work.model, _modules(layers))
    work.undo.callback(report.undo)
    _whole(report.refused, layers)


def _drop_gradients(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    work.undo.callback(drop_stale_gradients(work.model, _modules(layers)).undo)


def _replace(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    """Replace by the kind that the option names."""
    report = replace(work.model, str(option), _modules(layers))
    work.undo.callback(report.undo)
    _whole(report.refused, layers)


def _float32(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    report = to_float32(work.model, _modules(layers))
    work.undo.callback(report.undo)
    _whole(report.refused, layers)


def _convert(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    """Convert what the option says is held in place of the variance."""
    report = convert_variance(work.model, option, _modules(layers))  # type: ignore[arg-type]
    work.undo.callback(report.undo)
    _whole(report.refused, layers)


def _absorb(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    def run(model: nn.Module, batch: object) -> object:
        return call(model, batch, work.forward)

    report = absorb_bias(work.model, work.batches[0], _modules(layers), forward=run)
    work.undo.callback(report.undo)


def _track(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    report = track_statistics(
        work.model, iter(work.batches), _modules(layers), forward=work.forward
    )
    work.undo.callback(report.undo)
    _whole(report.refused, layers)


def _split(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    report = split_shared(work.model, iter(work.batches), _modules(layers), forward=work.forward)
    work.undo.callback(report.undo)
    _whole(report.refused, layers)


def _turn_momentum(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    """Set momentum m to 1 - m, rounded as people write it."""
    for layer in layers:
        before = layer.momentum
        if before is None:
            raise StateError(f"{layer.path} has no momentum any more")
        work.undo.callback(setattr, layer.module, "momentum", before)
        setattr(layer.module, "momentum", round(1 - before, 9))  # noqa: B010


def _pool(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    """Write the moments that were gathered from all ranks; this asks no other rank."""
    if work.peers is None:
        raise StateError("there are no other ranks to pool with")
    for layer in layers:
        for tensor, value in zip(
            (layer.running_mean, layer.running_var), work.peers.pooled(layer), strict=True
        ):
            if tensor is not None:
                work.undo.callback(write, tensor, tensor.detach().clone())
                write(tensor, value)


def _recalibrate(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    """Estimate the statistics of the layers; those that stillnorm holds are held again after."""
    held = {layer: _declared(layer) for layer in layers if layer.hold is not None}
    for layer, affine in held.items():
        unfreeze(work.model, layer.module)
        work.undo.callback(freeze, work.model, layer.module, affine=affine)
    modules = _modules(layers)
    report = recalibrate(
        work.model, iter(work.batches), modules, forward=work.forward, group="self"
    )
    work.undo.callback(report.undo)
    done = {layer.path for layer in report.layers}
    if left := [layer.path for layer in layers if layer.path not in done]:
        raise StateError(
            f"the statistics of {left[0]} cannot be estimated from the batches given to check",
            help="sn.recalibrate(model, batches) tells the reason",
        )
    _hold(work, held)


def _recalibrate_and_freeze(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    _recalibrate(work, layers, option)
    _freeze(work, layers, option)


def _freeze(work: _Work, layers: Sequence[NormLayer], option: Option) -> None:
    _hold(work, {layer: _declared(layer) for layer in layers if layer.hold is None})


def _hold(work: _Work, layers: Mapping[NormLayer, Affine]) -> None:
    for layer, affine in layers.items():
        freeze(work.model, layer.module, affine=affine, strict=True)
        work.undo.callback(unfreeze, work.model, layer.module)


def _declared(layer: NormLayer) -> Affine:
    """Return what the layer's own flags say of its affine parameters."""
    return "trains" if layer.trains_affine else "frozen"


_ACTIONS: dict[Action, Callable[[_Work, Sequence[NormLayer], Option], None]] = {
    "clone": _clone,
    "drop gradients": _drop_gradients,
    "replace": _replace,
    "float32": _float32,
    "convert": _convert,
    "absorb": _absorb,
    "track": _track,
    "split": _split,
    "momentum": _turn_momentum,
    "pool": _pool,
    "recalibrate": _recalibrate,
    "recalibrate and freeze": _recalibrate_and_freeze,
    "freeze": _freeze,
}
