"""SN601: a checkpoint without the buffers that its layers need."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.files.skeleton import STATISTICS
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms.layer import TENSORS
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import count

_BATCH_NORM = re.compile(r"(^|_)bn\d*($|_)|batch_?norm", re.IGNORECASE)
_NUMBER = re.compile(r"\d+")
_SHARD = re.compile(r"\d-of-\d")  # model-00001-of-00003.safetensors


class MissingStatistics(Rule):
    """A checkpoint lacks running statistics that its norm layers have to have.

    What it finds:
        A running mean without its variance or the reverse; a count of batches
        (`num_batches_tracked`) without statistics; a layer with weight and bias alone that is
        called batch norm and whose namesakes, at other positions in the model, have statistics.

    Why it matters:
        Statistics are buffers: a loop over `parameters()`, a filter of keys or an adapter leaves
        them out. `load_state_dict(strict=False)` then says nothing, the layer keeps mean 0 and
        variance 1, and eval outputs are those of another network.

    When it is fine:
        A checkpoint that is a part on purpose and is loaded over a whole model. Not reported:
        LayerNorm, GroupNorm and RMSNorm, which have no statistics: of 493 models of timm, fresh,
        none is. (By namesakes alone CoAtNets would be, whose `norm1` is now the one, now the
        other; so the name has to say batch norm.) One file of several cannot be decided. Where *no*
        layer of a checkpoint has any, weight and bias alone do not tell batch norm from a GroupNorm
        in its place (timm's `resnet50_gn` has the keys of a ResNet): the rule then says that it
        cannot tell, and `--weights` on the model itself does.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> state = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).state_dict()
        >>> del state["1.running_var"]
        >>> check(state).findings[0].slug
        'missing-statistics'

    Fix:
        None in the file. Save `model.state_dict()`, not `parameters()`; without another checkpoint,
        load this one and `sn.recalibrate(model, batches)`.

    References:
        torch/nn#1165; cleinc/bts#90 (a published decoder without statistics); huggingface/peft#1732
        and #3481; pytorch/pytorch#8430; TsingZ0/PFLlib#260.
    """

    code = "SN601"
    slug = "missing-statistics"
    severity = "error"
    needs = ("checkpoint",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        file = evidence.request.file
        if file is None or file.kind != "checkpoint":
            return  # a graph that lacked a tensor would not run
        if _SHARD.search(file.name):
            raise CannotTell("the rest of the checkpoint is in other files")
        layers = {path: layer for path, layer in _layers(file.state).items() if layer.is_norm}
        whole = {_pattern(path) for path, layer in layers.items() if layer.is_whole}
        lacking = {
            path: layer
            for path, layer in layers.items()
            if layer.is_torn or (layer.is_bare and _is_named(path) and _pattern(path) in whole)
        }
        if not lacking:
            named = sum(layer.is_bare and _is_named(path) for path, layer in layers.items())
            if named and not whole:
                raise CannotTell(
                    f"{count(named, 'layer')} called batch norm and no running statistics: "
                    "GroupNorm under that name, or parameters without buffers"
                )
            return
        paths = tuple(lacking)
        missing = dict.fromkeys(name for layer in lacking.values() for name in layer.missing)
        yield self.finding(
            paths,
            f"{count(len(paths), 'norm layer')} without {' and '.join(missing)}: loaded, "
            "the initial value stays",
            evidence={"missing": {path: layer.missing for path, layer in lacking.items()}},
            table=Table(
                ("", "has", "lacks"),
                tuple(
                    (path, ", ".join(layer.present), ", ".join(layer.missing))
                    for path, layer in list(lacking.items())[:3]
                ),
                "lll",
            ),
            help="save model.state_dict(), which has the buffers; or load this into the model and "
            "sn.recalibrate(model, batches)",
        )


@dataclass(frozen=True)
class _Layer:
    """What a checkpoint has under one prefix.

    Args:
        shapes: The names directly under it, and their tensors' shapes.
    """

    shapes: Mapping[str, tuple[int, ...]]

    @property
    def is_norm(self) -> bool:
        """Whether these can be a norm layer's: its names and no others, all of one length."""
        lengths = {shape for name, shape in self.shapes.items() if name != "num_batches_tracked"}
        return (
            self.shapes.keys() <= set(TENSORS)
            and self.shapes.get("num_batches_tracked", ()) == ()
            and len(lengths) <= 1
            and all(len(shape) == 1 for shape in lengths)
        )

    @property
    def missing(self) -> tuple[str, ...]:
        """The statistics that are not there."""
        return tuple(name for name in STATISTICS if name not in self.shapes)

    @property
    def present(self) -> tuple[str, ...]:
        """What is there."""
        return tuple(name for name in TENSORS if name in self.shapes)

    @property
    def is_whole(self) -> bool:
        """Whether it has both statistics."""
        return not self.missing

    @property
    def is_torn(self) -> bool:
        """Whether it has a part of what only layers with statistics have."""
        return not self.is_whole and (
            len(self.missing) == 1 or "num_batches_tracked" in self.shapes
        )

    @property
    def is_bare(self) -> bool:
        """Whether it is weight and bias alone."""
        return self.shapes.keys() == {"weight", "bias"}


def _layers(state: Mapping[str, Tensor]) -> dict[str, _Layer]:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in state.items():
        prefix, _, name = key.rpartition(".")
        found.setdefault(prefix, {})[name] = () if tensor.is_nested else tuple(tensor.shape)
    return {prefix: _Layer(shapes) for prefix, shapes in found.items()}


def _is_named(path: str) -> bool:
    """Tell whether a layer is called batch norm: bn1, conv_bn, batch_norm."""
    return _BATCH_NORM.search(path.rpartition(".")[2]) is not None


def _pattern(path: str) -> str:
    """Return what layers at the same place of other blocks have in common: ``layer#.#.bn1``."""
    above, dot, name = path.rpartition(".")
    return _NUMBER.sub("#", above) + dot + name
