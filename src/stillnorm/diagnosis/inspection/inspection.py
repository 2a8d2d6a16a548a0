"""`inspect`: what every norm layer does, read off the model and, with a batch, off its forward."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from stillnorm.diagnosis.files.checkpoint import Target, opened
from stillnorm.diagnosis.files.skeleton import Stored
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.inspection.inspection_screen import document
from stillnorm.diagnosis.runner import check
from stillnorm.norms import Modes, NormalizesBy, NormLayer, find_norms, probe_modes, walk
from stillnorm.reports import Document, json, text
from stillnorm.tracing import Trace, each_batch, trace

Forward = Callable[[Any, Any], object]


@dataclass(frozen=True)
class Inspected:
    """One norm layer: what it is, and which way its three switches stand in each mode.

    What a file does not say of a layer is None: all but its path, channels and tensors.

    Args:
        path: Its path in the model; empty for a model that is itself a norm layer.
        paths: All its paths, where it is registered more than once.
        kind: The class name; of a layer that stillnorm holds, the name before.
        num_features: The number of channels; 0 for a lazy layer before its first forward.
        provider: The library whose layer it is: ``"torch"``, ``"torchvision"``, ``"keras"``.
        training: Its flag `training` now, which means nothing to a layer of Keras.
        normalizes_by_in_train: What it would normalise by after `model.train()`: ``"batch"``,
            ``"running"``, or ``"sample"`` (instance norm).
        normalizes_by_in_eval: The same after `model.eval()`.
        updates_statistics: Whether a forward after `model.train()` would move its statistics.
        has_affine: Whether it has a weight or a bias.
        trains_affine: Whether a gradient reaches them.
        held: What keeps it frozen through `model.train()`: ``"stillnorm"``, a user's own
            ``"MyNet.train()"``, ``"torchvision FrozenBatchNorm2d"``, Keras's own
            ``"trainable=False"``; or None.
        eps: What is added to the variance.
        momentum: The weight of the new batch in the running statistics; None for the average.
        batches_seen: `num_batches_tracked`, where it exists; 0 can be a legacy checkpoint.
        variance: The smallest and the largest running variance; None without one.
        dtype: ``"float32"``; ``"float16/float32"`` where affine and statistics differ.
        used: With a batch: what each call of the forward really normalised by, in order; ``()``
            for a layer that was never called. None without a batch. Of an exported graph: what it
            normalises by.
    """

    path: str
    paths: tuple[str, ...]
    kind: str | None
    num_features: int
    provider: str | None
    training: bool | None
    normalizes_by_in_train: NormalizesBy | None
    normalizes_by_in_eval: NormalizesBy | None
    updates_statistics: bool | None
    has_affine: bool
    trains_affine: bool | None
    held: str | None
    eps: float | None
    momentum: float | None
    batches_seen: int | None
    variance: tuple[float, float] | None
    dtype: str
    used: tuple[NormalizesBy, ...] | None


@dataclass(frozen=True)
class Inspection:
    """What `inspect` saw.

    Args:
        model: The model's class name, or the file's.
        training: Its flag `training` now; None of a file.
        layers: One row per norm layer, in registration order.
        findings: Errors and warnings of the rules that need no data.
        file: What `model` is where it names a file: "checkpoint"; empty for a model.
    """

    model: str
    training: bool | None
    layers: tuple[Inspected, ...]
    findings: tuple[Finding, ...]
    file: str = ""

    def document(self, all: bool = False) -> Document:
        """Return it as a document; identical siblings share a row unless `all` is asked for."""
        return document(self, all=all)

    def to_json(self) -> str:
        """Return it as JSON, every layer a row."""
        return json.dumps(self)

    def __str__(self) -> str:
        return text.write(self.document())


def inspect(
    model: nn.Module | Target, batch: object = None, *, forward: Forward | None = None
) -> Inspection:
    """See what every norm layer of a model does.

    Args:
        model: The model, in any mode; nothing about it is changed. Or a file, as `check` takes it.
        batch: A batch to run the model on, in its present modes, to see what the layers really
            use, which can differ from what their flags say. Of several batches the first is run.
        forward: How to call the model on it, ``(model, batch) -> output``.

    Returns:
        One row per layer. Printed, identical siblings collapse.

    Raises:
        BatchError: The model cannot be called on the batch; or it is a file.
        FileFormatError: The file cannot be read.

    Cost:
        Without a batch, reading each layer's variance; with one, a forward without gradients.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> (row,) = inspect(net).layers
        >>> row.path, row.normalizes_by_in_train, row.normalizes_by_in_eval, row.held
        ('1', 'batch', 'running', None)
    """
    if not isinstance(model, nn.Module):
        return _of_file(*opened(model), batch, forward)
    modes = probe_modes(model)
    seen = None
    if batch is not None:
        seen = trace(model, itertools.islice(each_batch(batch), 1), forward=forward, flow="as_is")
    return Inspection(
        model=_name(model),
        training=model.training,
        layers=tuple(_row(layer, modes, seen) for layer in find_norms(model)),
        findings=tuple(f for f in check(model).findings if f.severity != "info"),
    )


def _of_file(file: Stored, tree: nn.Module, batch: object, forward: Forward | None) -> Inspection:
    """See what a file says of its norm layers."""
    report = check(file, batch, forward=forward)
    uses = {norm.path: norm.uses for norm in file.norms}
    return Inspection(
        model=file.name,
        training=None,
        layers=tuple(_stored_row(layer, uses.get(layer.path)) for layer in find_norms(tree)),
        findings=tuple(f for f in report.findings if f.severity != "info"),
        file=file.title,
    )


def _stored_row(layer: NormLayer, uses: NormalizesBy | None) -> Inspected:
    return Inspected(
        path=layer.path,
        paths=layer.paths,
        kind=None,
        num_features=layer.num_features,
        provider=None,
        training=None,
        normalizes_by_in_train=None,
        normalizes_by_in_eval=None,
        updates_statistics=None,
        has_affine=layer.weight is not None or layer.bias is not None,
        trains_affine=None,
        held=None,
        eps=None if math.isnan(layer.eps) else layer.eps,
        momentum=None,
        batches_seen=_batches_seen(layer),
        variance=_variance(layer),
        dtype=_dtype(layer),
        used=None if uses is None else (uses,),
    )


def _row(layer: NormLayer, modes: Modes, seen: Trace | None) -> Inspected:
    in_train, in_eval = modes.in_train[layer.module], modes.in_eval[layer.module]
    return Inspected(
        path=layer.path,
        paths=layer.paths,
        kind=layer.kind,
        num_features=layer.num_features,
        provider=layer.provider,
        training=layer.module.training,
        normalizes_by_in_train=layer.normalizes_by(in_train),
        normalizes_by_in_eval=layer.normalizes_by(in_eval),
        updates_statistics=layer.updates_statistics(in_train),
        has_affine=layer.weight is not None or layer.bias is not None,
        trains_affine=layer.trains_affine,
        held=modes.held_by(layer),
        eps=layer.eps,
        momentum=layer.momentum,
        batches_seen=_batches_seen(layer),
        variance=_variance(layer),
        dtype=_dtype(layer),
        used=None if seen is None else tuple(call.used for call in seen.by_layer(layer.path)),
    )


def _batches_seen(layer: NormLayer) -> int | None:
    counter = layer.num_batches_tracked
    return None if counter is None or counter.is_meta else int(counter)


def _variance(layer: NormLayer) -> tuple[float, float] | None:
    var = layer.running_var
    if var is None or var.is_meta or layer.is_lazy or var.numel() == 0:
        return None
    return float(var.min()), float(var.max())


def _dtype(layer: NormLayer) -> str:
    """Name the dtype of affine and statistics, both where they differ."""
    tensors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    names = (str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor is not None)
    return "/".join(dict.fromkeys(names))


def _name(model: nn.Module) -> str:
    """Name the model's class, of a wrapped model that of the user's."""
    inner = [module for path, module, _ in walk(model) if not path][-1]
    return str(getattr(inner, "original_name", type(inner).__name__))
