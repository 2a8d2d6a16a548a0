"""What a file holds of a model: its norm layers, as a tree of modules that rules can read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stillnorm.norms import NormalizesBy
from stillnorm.norms.layer import TENSORS
from stillnorm.state.record import dotted

Kind = Literal["checkpoint", "ONNX graph", "exported program"]


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
        for path in (*first, *filter(None, norms)):
            parent, here = root, ""
            for part in path.split("."):
                here = dotted(here, part)
                parent = _child(parent, part, norms.get(here))
        return root


def _child(parent: nn.Module, name: str, new: nn.Module | None) -> nn.Module:
    """Return the child of that name, which is made where there is none; any name will do."""
    child = parent._modules.get(name) or new or nn.Module()
    parent._modules[name] = child
    return child


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
