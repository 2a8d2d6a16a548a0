"""The view on one norm layer: what it is and which way its three switches stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from stillnorm.norms.adapters import keras
from stillnorm.norms.adapters.adapter import Adapter, Family
from stillnorm.norms.adapters.detectron2 import provider_of_copy
from stillnorm.norms.hold import Hold, hold_of

NormalizesBy = Literal["batch", "running", "sample"]

TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, eq=False)
class NormLayer:
    """A norm layer of a model, read live: nothing is copied, nothing is changed.

    A layer's mode is three switches: it normalises by batch or running statistics
    (`normalizes_by`), it updates statistics or not (`updates_statistics`), it trains its affine
    parameters or not (`trains_affine`).

    Args:
        paths: Every path of the layer in the model, in registration order.
        module: The layer itself.
        ancestors: The modules above it along its first path, from the root.
        adapter: The adapter that recognised it.
        elsewhere: The modules above it along its other paths only.
    """

    paths: tuple[str, ...]
    module: nn.Module
    ancestors: tuple[nn.Module, ...]
    adapter: Adapter
    elsewhere: tuple[nn.Module, ...] = ()

    @property
    def path(self) -> str:
        """The first path; empty for a model that is itself a norm layer."""
        return self.paths[0]

    @property
    def above(self) -> tuple[nn.Module, ...]:
        """Every module above the layer, along all its paths."""
        return (*self.ancestors, *self.elsewhere)

    @property
    def family(self) -> Family:
        """Batch or instance norm, or another library's frozen layer."""
        return self.adapter.family

    @property
    def provider(self) -> str:
        """The library that defines the layer's behaviour."""
        if self.adapter.provider == "detectron2":
            return provider_of_copy(self.module)
        return self.adapter.provider

    @property
    def kind(self) -> str:
        """The class name; of a held layer, the name of the class that it had before."""
        if self.is_scripted:
            return str(self.module.original_name)
        kind = type(self.module)
        base: type = getattr(kind, "held_base", kind)
        return base.__name__

    # ------------------------------------------------------------------ tensors and settings

    def _tensor(self, name: str) -> Tensor | None:
        return self.adapter.tensor(self.module, name)

    @property
    def weight(self) -> Tensor | None:
        """The scale, (C,), or None."""
        return self._tensor("weight")

    @property
    def bias(self) -> Tensor | None:
        """The shift, (C,), or None."""
        return self._tensor("bias")

    @property
    def running_mean(self) -> Tensor | None:
        """The running mean, (C,), or None."""
        return self._tensor("running_mean")

    @property
    def running_var(self) -> Tensor | None:
        """The running variance (a variance, unbiased; not a deviation), (C,), or None."""
        return self._tensor("running_var")

    @property
    def num_batches_tracked(self) -> Tensor | None:
        """The number of batches seen, (), or None; 0 can be a checkpoint older than torch 0.4.1."""
        return self._tensor("num_batches_tracked")

    def tensors(self) -> dict[str, Tensor]:
        """Return the affine parameters and statistics that exist, by name."""
        named = {name: self._tensor(name) for name in TENSORS}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def num_features(self) -> int:
        """The number of channels; 0 for a lazy layer before its first forward."""
        if isinstance(declared := getattr(self.module, "num_features", None), int):
            return declared
        return 0 if self.running_mean is None else self.running_mean.numel()

    @property
    def eps(self) -> float:
        """What is added to the variance."""
        return self.adapter.eps(self.module)

    @property
    def momentum(self) -> float | None:
        """The weight of the new batch in the statistics; None for the cumulative average."""
        return self.adapter.momentum(self.module)

    @property
    def tracks(self) -> bool:
        """The flag `track_running_stats`; always on in Keras."""
        if self.family == "keras":
            return True
        return bool(getattr(self.module, "track_running_stats", False))

    # ------------------------------------------------------------------ what it is

    @property
    def has_statistics(self) -> bool:
        """Whether the layer has a running mean and a running variance."""
        return self.running_mean is not None and self.running_var is not None

    @property
    def is_lazy(self) -> bool:
        """Whether the layer waits for its first forward to learn its number of channels."""
        waiting = any(
            isinstance(tensor, UninitializedParameter | UninitializedBuffer)
            for tensor in self.tensors().values()
        ) or (self.family == "keras" and self.running_mean is None)
        return waiting or (hasattr(type(self.module), "cls_to_become") and self.num_features == 0)

    @property
    def is_scripted(self) -> bool:
        """Whether the layer is TorchScript's."""
        return isinstance(self.module, torch.jit.ScriptModule)

    @property
    def never_estimated(self) -> bool:
        """Whether the statistics are the initial ones: mean 0 and variance 1 in every channel."""
        mean, var = self.running_mean, self.running_var
        if mean is None or var is None or self.is_lazy or mean.is_meta or var.is_meta:
            return False
        return bool((mean == 0).all()) and bool((var == 1).all())

    @property
    def hold(self) -> Hold | None:
        """Stillnorm's hold on the layer, or None."""
        return hold_of(self.module)

    # ------------------------------------------------------------------ the three switches

    def normalizes_by(self, training: bool) -> NormalizesBy:
        """Tell what the forward would use if the layer's flag `training` were as given.

        For a layer of Keras', if the argument `training` of its call were.
        """
        if self.family == "frozen" or self.hold is not None:
            return "running"
        if self.family == "keras" and not keras.trains(self.module):
            return "running"
        if self.family == "instance":
            return "sample" if training or not self.tracks else "running"
        return "batch" if training or not self.has_statistics else "running"

    def updates_statistics(self, training: bool) -> bool:
        """Tell whether a forward would move the statistics if `training` were as given."""
        if self.family == "frozen" or self.hold is not None:
            return False
        if not self.has_statistics or self.momentum == 0:
            return False
        if self.family == "keras" and not keras.trains(self.module):
            return False
        if self.family == "instance":  # untracked it writes them in eval mode too; None is 0 to it
            return self.momentum is not None and (training or not self.tracks)
        return training and self.tracks

    @property
    def trains_affine(self) -> bool:
        """Whether a gradient reaches the weight or the bias."""
        if self.family == "frozen" or (self.hold is not None and self.hold.affine == "frozen"):
            return False
        return any(t is not None and t.requires_grad for t in (self.weight, self.bias))

    # ------------------------------------------------------------------ what it is called on

    def called_in_training(self, kwargs: Mapping[str, object]) -> bool:
        """Tell in which mode a call is, of which these are the keyword arguments."""
        return bool(kwargs.get("training") if self.family == "keras" else self.module.training)

    def channels_first(self, x: Tensor) -> Tensor:
        """Return an input with its channels at axis 1, where torch's layers have them."""
        return x.movedim(keras.axis(self.module), 1) if self.family == "keras" else x

    def __repr__(self) -> str:
        return f"NormLayer({self.path or '(root)'}: {self.kind}({self.num_features}))"
