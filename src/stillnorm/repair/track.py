"""Giving statistics to norms that keep none, so that eval no longer depends on the batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from stillnorm.calibration import RecalibrationReport, recalibrate
from stillnorm.norms import Layers, NormLayer, probe_modes, select
from stillnorm.repair.report import Written, left_alone
from stillnorm.repair.surgery import Surgery, refuse_wrapped
from stillnorm.reports import Block, Document, Line, Table
from stillnorm.reports.numbers import count
from stillnorm.tracing import Forward


@dataclass(frozen=True, eq=False)
class TrackReport(Written):
    """What `track_statistics` did.

    Args:
        tracked: Paths of the layers that have statistics of their own now.
        refused: (path, reason) of layers that have none and were left alone.
        recalibration: How the statistics were estimated; None where no layer needed any.
    """

    tracked: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    recalibration: RecalibrationReport | None
    _surgery: Surgery = field(repr=False)

    def undo(self) -> None:
        """Take the statistics away again."""
        self._surgery.undo()

    def document(self) -> Document:
        """Return the report as a document."""
        blocks: list[Block] = []
        if self.tracked:
            rows = tuple((path or "(root)",) for path in self.tracked)
            blocks += [Line(""), Table(("has running statistics now",), rows, "l")]
        blocks += left_alone(self.refused)
        return Document(f"{count(len(self.tracked), 'layer')} given statistics", tuple(blocks))


def track_statistics(
    model: nn.Module,
    batches: object,
    layers: Layers = None,
    *,
    forward: Forward | None = None,
) -> TrackReport:
    """Give batch norms without running statistics their own, estimated from data.

    For layers made with ``track_running_stats=False``, or whose flag was switched off later: they
    normalise by the batch in eval mode, too, so that a prediction depends on what else is in the
    batch, and a single sample fails; or they never update what they have. Afterwards they are as if
    they had been made with the flag on, and trained on the batches given.

    Args:
        model: The model, in whatever mode.
        batches: As `recalibrate` takes them, of training data.
        layers: Which layers; see `select`. Default: every batch norm that has no statistics or has
            the flag off. Instance norms are left alone: they normalise by the sample, in both
            modes, by design.
        forward: ``(model, batch) -> output``, where the model cannot be called on a batch itself.

    Returns:
        Which layers have statistics now; which have none still, and why; `undo()`.

    Raises:
        StateError: The model is wrapped for distributed training.
        CalibrationError: The batches give no statistics.
        BatchError: A batch does not fit the model, or the forward raised.
        SelectorError: `layers` matches nothing.

    Mutates:
        The flag and the buffers of the layers: all of them or, if anything is raised, none. The
        keys of `state_dict` gain three for each layer that had none.

    Cost:
        That of `recalibrate`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False))
        >>> track_statistics(net, torch.randn(64, 4)).tracked
        ('1',)
        >>> net.eval()(torch.randn(1, 4)).shape
        torch.Size([1, 8])
    """
    refuse_wrapped(model)
    refused: list[tuple[str, str]] = []
    with Surgery() as surgery:
        edits: dict[str, tuple[NormLayer, Surgery]] = {}
        for layer in select(model, layers):
            if layer.has_statistics and (layer.tracks or layer.family != "batch"):
                continue
            if reason := _refusal(layer):
                refused.append((layer.path, reason))
            else:
                edits[layer.path] = layer, surgery.part()
                _equip(model, layer, edits[layer.path][1])
        done: RecalibrationReport | None = None
        if edits:
            chosen = [layer.module for layer, _ in edits.values()]
            modes = probe_modes(model)
            # What a train() of the model's own holds would pass its input on as it is meanwhile.
            held = any(modes.held_by(layer) is not None for layer, _ in edits.values())
            done = recalibrate(
                model,
                batches,
                chosen,
                forward=forward,
                method="sequential" if held else "pooled",
                group="self",
            )
            reasons = dict(done.refused) | dict.fromkeys(done.unreached, "no batch reached it")
            for path, reason in reasons.items():
                edits.pop(path)[1].undo()
                refused.append((path, reason))
        return TrackReport(tuple(edits), tuple(refused), done, surgery)


def _refusal(layer: NormLayer) -> str | None:
    if layer.family == "instance":
        return "is an instance norm: it normalises by the sample in both modes"
    if layer.family != "batch":
        return "is another library's frozen layer"
    if layer.is_scripted:
        return "is TorchScript's: give it statistics before scripting"
    if layer.is_lazy:
        return "is lazy and has not been called yet"
    if layer.hold is not None:
        return "is held"
    return None


def _equip(model: nn.Module, layer: NormLayer, surgery: Surgery) -> None:
    """Switch the flag on and register what is missing, as a new layer has it."""
    module = layer.module
    surgery.set_attribute(module, "track_running_stats", True)
    if layer.has_statistics:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if (tensor := layer.tensors().get(name)) is not None:
                surgery.keep(tensor)
        return
    like = _like(model, layer)
    c = layer.num_features
    with torch.inference_mode(False):
        made = torch.zeros(c, dtype=like.dtype, device=like.device)
        _register(surgery, module, made)


def _like(model: nn.Module, layer: NormLayer) -> Tensor:
    """Return a tensor of the dtype and on the device that the statistics should have."""
    if layer.weight is not None:
        return layer.weight
    found = [p for p in model.parameters() if p.is_floating_point()]
    device = found[0].device if found else None
    one = len({p.dtype for p in found}) == 1
    return found[0] if one else torch.zeros((), device=device)


def _register(surgery: Surgery, module: nn.Module, made: Tensor) -> None:
    surgery.set_buffer(module, "running_mean", made)
    surgery.set_buffer(module, "running_var", torch.ones_like(made))
    tracked = torch.zeros((), dtype=torch.long, device=made.device)
    surgery.set_buffer(module, "num_batches_tracked", tracked)
