"""The proof that layers are frozen: nothing recorded has moved, and `train()` would not move it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from stillnorm.errors import SelectorError, VerifyError
from stillnorm.norms import (
    Layers,
    Modes,
    NormLayer,
    find_norms,
    matcher,
    probe_modes,
    select,
    walk,
)
from stillnorm.norms.adapters.torch import BATCH
from stillnorm.reports.numbers import count
from stillnorm.state.change import Change, TensorChange, changes
from stillnorm.state.record import AFFINE, Recorded, record, shown

_MOVED = ".diff(model) lists every change, .restore(model) takes them back"
_NOT_FROZEN = (
    "sn.freeze(model) holds it, before training; a model that was trained so wants "
    "sn.recalibrate(model, batches)"
)
_OTHER_LAYERS = "take a new snapshot, or select the layers that both have with layers="


def verify(recorded: tuple[Recorded, ...], model: nn.Module, layers: Layers = None) -> None:
    """Raise VerifyError unless the selected layers are frozen and as recorded."""
    if isinstance(layers, Iterable) and not isinstance(layers, str | nn.Module):
        layers = list(layers)
    gone = _gone(recorded, model, layers)
    try:
        chosen = select(model, layers)
    except SelectorError:
        if not gone:
            raise
        chosen = ()
    then = {path: layer for layer in recorded for path in layer.paths}
    modes = probe_modes(model)
    faulty = [(path, ["is no norm layer any more"], _OTHER_LAYERS) for path in gone]
    for norm in chosen:
        # Several, if what was two layers is now one.
        known = {id(then[path]): then[path] for path in norm.paths if path in then}
        if not known:
            faulty.append((norm.path, ["is not in the snapshot"], _OTHER_LAYERS))
        for before in known.values():
            moved, thawed = _moved(before, norm), _thawed(before, norm, modes)
            faults = [str(change) for change in moved]
            if thawed is not None:  # after the first tensor, if one moved
                faults.insert(int(any(isinstance(c, TensorChange) for c in moved)), thawed)
            if faults:
                faulty.append((norm.path, faults, _NOT_FROZEN if thawed else _MOVED))
    if faulty:
        raise _error(faulty)


def _moved(before: Recorded, norm: NormLayer) -> list[Change]:
    """Return what changed in a layer that must not have."""
    hold = before.hold or norm.hold
    affine_may_move = hold is not None and hold.affine == "trains"
    found = changes(before, record(norm), norm.path)
    return [change for change in found if _matters(change, affine_may_move)]


def _matters(change: Change, affine_may_move: bool) -> bool:
    """Tell whether a frozen layer may not change so."""
    if isinstance(change, TensorChange):
        return not change.is_cast and not (affine_may_move and change.tensor in AFFINE)
    if change.switch.endswith(".requires_grad"):  # freezing turns it off
        return change.after is True and not affine_may_move
    return change.switch in ("momentum", "eps", "track_running_stats")


def _thawed(before: Recorded, norm: NormLayer, modes: Modes) -> str | None:
    """Return why a layer is not frozen as it was, or None when it is."""
    if norm.hold is not None:
        learns = before.hold and (before.hold.affine, norm.hold.affine) == ("frozen", "trains")
        return "its affine parameters were held and train now" if learns else None
    flags = {modes.in_train[norm.module], bool(getattr(norm.module, "training", False))}
    in_eval = norm.normalizes_by(training=False)
    used = {norm.normalizes_by(flag) for flag in flags}
    by = next((by for by in used if by == "batch" or by != in_eval), None)
    updates = any(norm.updates_statistics(flag) for flag in flags)
    was_held = before.hold is not None
    if not (by or updates or was_held):
        return None
    would = f"would normalise by the {by} in train()" if by else "would update its statistics"
    if norm.is_scripted:
        return "TorchScript's train() normalises by the batch: torch.jit.script undoes a hold"
    if norm.kind == "SyncBatchNorm" and (was_held or before.switches["kind"] != norm.kind):
        return "convert_sync_batchnorm made a new layer of it, which is not held"
    if was_held:
        return f"its hold is gone: it {would}" if by or updates else "its hold is gone"
    if not norm.has_statistics:
        return "has no running statistics: it normalises by the batch in eval() too"
    if norm.momentum == 0:
        return f"{would}: momentum 0 stops only the updates"
    return would


def _gone(recorded: tuple[Recorded, ...], model: nn.Module, layers: Layers) -> list[str]:
    """Return the recorded paths that `layers` means and that have no norm layer any more."""
    norms = {path for norm in find_norms(model) for path in norm.paths}
    paths = [path for layer in recorded for path in layer.paths if path not in norms]
    if layers is None or not paths:
        return paths
    means = matcher(layers)
    standing = {path: (module, ancestors) for path, module, ancestors in walk(model)}

    def in_its_place(path: str) -> NormLayer:
        """View what stands at the path, or nearest above it, as the layer that was there."""
        parts = path.split(".")
        above = (".".join(parts[:n]) for n in range(len(parts), -1, -1))
        return NormLayer((path,), *standing[next(p for p in above if p in standing)], BATCH)

    return [path for path in paths if means(in_its_place(path))]


def _error(faulty: list[tuple[str, list[str], str]]) -> VerifyError:
    """Name the first faulty layer with its faults, and the number of the others."""
    path, faults, help = faulty[0]
    shortened = faults if len(faults) <= 3 else [*faults[:2], f"{len(faults) - 2} more"]
    others = f" (and {count(len(faulty) - 1, 'more layer')})" if len(faulty) > 1 else ""
    return VerifyError(f"{shown(path)}: {'; '.join(shortened)}{others}", help=help)
