"""What a file holds of a model: its norm layers, as a tree of modules that rules can read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stillnorm.norms import NormalizesBy
from stillnorm.norms.layer import TENSORS
from stillnorm.state.record import dotted

Kind = Literal["checkpoint", "ONNX graph", "exported program"]

STATISTICS = ("running_mean", "running_var")
_COUNTER = "num_batches_tracked"
_MOST_CHANNELS = 1 << 24  # an expanded tensor can have any number, and no file is large for it
_DEEPEST = 100  # components of a path; modules are walked by recursion


@dataclass(frozen=True, eq=False)
class StoredNorm:
    """A norm layer in a file: its tensors and, where there is a graph, its settings.

    Args:
        path: Its path; in a graph, the node's name where the tensors have none.
        tensors: What there is of weight, bias, running_mean, running_var, num_batches_tracked.
        eps: What is added to the variance; NaN where the file does not say.
        uses: What it normalises by; None where the file does not say.
    """

    path: str
    tensors: Mapping[str, Tensor]
    eps: float = math.nan
    uses: NormalizesBy | None = None


@dataclass(frozen=True, eq=False)
class Stored:
    """A file, read.

    Args:
        name: The file's name.
        kind: What it is.
        norms: The norm layers in it.
        state: All tensors of a checkpoint, by key.
        note: What else should be known: which of several states was read.
    """

    name: str
    kind: Kind
    norms: tuple[StoredNorm, ...]
    state: Mapping[str, Tensor] = field(default_factory=dict)
    note: str = ""

    @property
    def has_values(self) -> bool:
        """Whether any tensor of the norm layers has values: those on the meta device have none."""
        tensors = [tensor for norm in self.norms for tensor in norm.tensors.values()]
        return not tensors or not all(tensor.is_meta for tensor in tensors)

    @property
    def title(self) -> str:
        """What the head of a report says of it."""
        return f"{self.kind} ({self.note})" if self.note else self.kind

    def tree(self) -> nn.Module:
        """Return modules with the tensors of the norm layers, at their paths. They cannot be run.

        Example:
            >>> import torch
            >>> norm = StoredNorm("net.bn", {"running_mean": torch.zeros(2)})
            >>> Stored("a.pt", "checkpoint", (norm,)).tree()
            Module(
              (net): Module(
                (bn): Norm()
              )
            )
        """
        norms: dict[str, nn.Module] = {norm.path: Norm(norm) for norm in self.norms}
        root = norms.get("", nn.Module())
        # A lone first component "module" would be taken for a wrapper: all others count too.
        first = (key.partition(".")[0] for key in self.state if "." in key)
        for path in filter(None, (*first, *norms)):
            parent, here = root, ""
            for part in _parts(path):
                here = dotted(here, part)
                parent = _child(parent, part, norms.get(here))
        return root


def _parts(path: str) -> list[str]:
    """Split a path; one that no tree of modules can have is a single name."""
    parts = path.split(".")
    return parts if all(parts) and len(parts) <= _DEEPEST else [path]


def _child(parent: nn.Module, name: str, new: nn.Module | None) -> nn.Module:
    """Return the child of that name, which is made where there is none; any name will do."""
    child = parent._modules.get(name) or new or nn.Module()
    parent._modules[name] = child
    return child


def unreadable(name: str, tensor: Tensor) -> str:
    """Say why a tensor cannot be one of a norm layer's; nothing where it can.

    Args:
        name: Which of the layer's tensors it would be.
        tensor: The tensor, which is not copied: it can be larger than the memory.
    """
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return "sparse"
    if tensor.numel() > _MOST_CHANNELS:
        return f"{tensor.numel()} values"
    is_small_float = tensor.is_floating_point() and tensor.itemsize == 1
    is_number = tensor.is_floating_point() or name not in STATISTICS
    if tensor.is_complex() or tensor.is_quantized or is_small_float or not is_number:
        return str(tensor.dtype).removeprefix("torch.")
    is_count = name == _COUNTER and tensor.ndim == 0 and not tensor.is_meta
    return str(tensor.item()) if is_count and not tensor.isfinite() else ""


def matching(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that can be read and are of one layer: as long as its statistics."""
    readable = {name: t for name, t in tensors.items() if not unreadable(name, t)}
    ordered = (readable[name] for name in (*STATISTICS, *TENSORS) if name in readable)
    shape = next((tensor.shape for tensor in ordered if tensor.ndim == 1), None)
    return {
        name: tensor
        for name, tensor in readable.items()
        if tensor.shape == (() if name == _COUNTER else shape)
    }


def merged(norms: Iterable[StoredNorm]) -> tuple[StoredNorm, ...]:
    """Return the norm layers of a graph: calls of the same layer are one, by batch if one is."""
    found: dict[str, StoredNorm] = {}
    for norm in norms:
        first = found.setdefault(norm.path, norm)
        if norm.uses == "batch":
            found[norm.path] = replace(first, uses="batch")
    return tuple(found.values())


class Norm(_BatchNorm):
    """A norm layer known by its tensors: it can be read, not run.

    Args:
        norm: What is known of it.
    """

    def __init__(self, norm: StoredNorm) -> None:
        nn.Module.__init__(self)
        for name in TENSORS:
            tensor = norm.tensors.get(name)
            if name not in ("weight", "bias"):
                self.register_buffer(name, tensor)
            else:
                kept = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
                self.register_parameter(name, kept)
        self.num_features = max((tensor.numel() for tensor in norm.tensors.values()), default=0)
        self.eps, self.momentum = norm.eps, None  # momentum is no file's
        self.affine = self.weight is not None
        self.track_running_stats = self.running_mean is not None
        self.training = False

    def extra_repr(self) -> str:
        """Say nothing: the settings are not known."""
        return ""
