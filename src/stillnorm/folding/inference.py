"""What of a model can be folded for inference: each norm, in which layer, and how well."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from stillnorm.convolutions import Convolution, Geometry, convolve
from stillnorm.folding.algebra import (
    Affine,
    affine_of,
    cast,
    fold_after,
    fold_before,
    two_layers,
    wide,
)
from stillnorm.folding.error import FoldError, fold_error, measured_in
from stillnorm.folding.pairs import find_candidates
from stillnorm.folding.remainder import why_not_replace
from stillnorm.holding.folding import is_convolutional
from stillnorm.holding.hooks import sees_input
from stillnorm.norms import NormLayer, find_norms
from stillnorm.tracing.kernels import Kernel
from stillnorm.tracing.links import LayerCall, Links, Output, Use, links


@dataclass(eq=False)
class Fold:
    """A convolution or linear layer, and the norms that it absorbs.

    Args:
        module: The layer.
        weight: The weight that its calls used, which may be computed from others.
        bias: The bias that they used.
        geometry: Its geometry; None for a linear layer.
        before: The norm before it.
        after: The norm after it.
    """

    module: nn.Module
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry | None
    before: NormLayer | None = None
    after: NormLayer | None = None

    def weights(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return weight, bias, and the weight for a channel of ones, rounded once.

        Raises:
            OverflowError: A value does not fit the weight's dtype.
        """
        weight, bias = wide(self.weight), None if self.bias is None else wide(self.bias)
        border = None
        if self.before is not None:
            weight, bias, border = fold_before(
                weight, bias, constants_of(self.before), self.geometry
            )
        if self.after is not None:
            norm = constants_of(self.after)
            if border is not None:
                border = fold_after(border, None, norm, _ungrouped(self.geometry))[0]
            weight, bias = fold_after(weight, bias, norm, self.geometry)
        like = self.weight
        return (
            cast(weight, like),
            None if bias is None else cast(bias, like),
            None if border is None else cast(border, like),
        )


def _ungrouped(geometry: Geometry | None) -> Geometry | None:
    return None if geometry is None else geometry._replace(groups=1)


def constants_of(norm: NormLayer) -> Affine:
    """Return what a norm layer does in eval mode."""
    mean, var = norm.running_mean, norm.running_var
    if mean is None or var is None:
        raise ValueError(f"{norm.path} has no running statistics")
    return affine_of(mean, var, norm.weight, norm.bias, norm.eps)


@dataclass(frozen=True, eq=False)
class Plan:
    """What folds in a model.

    Args:
        folds: The layers that absorb norms.
        refused: By norm, why it stays.
        errors: By norm that folds, its worst rounding errors on the example.
    """

    folds: tuple[Fold, ...]
    refused: Mapping[NormLayer, str]
    errors: Mapping[NormLayer, FoldError]


@dataclass(eq=False)
class _Measured:
    """What the example showed: rounding errors, and the calls of each convolution."""

    errors: dict[tuple[nn.Module, nn.Module], FoldError] = field(default_factory=dict)
    calls: dict[nn.Module, Fold] = field(default_factory=dict)

    def note(self, convolution: nn.Module, norm: nn.Module, error: FoldError) -> None:
        worst = self.errors.get((convolution, norm))
        if worst is None or worst.is_right:
            self.errors[convolution, norm] = error


def plan_fold(model: nn.Module, run: Callable[[], object]) -> Plan:
    """Run the model, in eval mode, and tell which of its norms fold, and where.

    Args:
        model: The model.
        run: Runs it on the example.

    Mutates:
        Nothing.
    """
    norms = find_norms(model)
    by_module = {norm.module: norm for norm in norms}
    seen = _Measured()

    def measure(output: Output, use: Use, call: LayerCall | None) -> None:
        other = use.by
        if isinstance(output.call, Convolution) and other in by_module:
            _measure(seen, output.call, output.module, by_module[other], before=False)
        elif isinstance(output.call, Kernel) and isinstance(call, Convolution) and other:
            x = output.call.input
            _measure(seen, call, other, by_module[output.module], before=True, x=x)

    found = links(model, norms, run, measure)
    refused = {norm: why for norm in norms if (why := why_not_replace(norm)) is not None}
    refused |= {n: "a hook on it sees its input" for n in norms if sees_input(n.module)}
    able = [norm for norm in norms if norm not in refused]
    folds: dict[nn.Module, Fold] = {}
    behind = _fold_behind(model, able, found, seen, folds)
    ahead = _fold_ahead(model, [n for n in able if n in behind], found, seen, folds)
    reasons = {n: _both(behind[n], ahead[n]) for n in ahead}
    refused = {n: (refused | reasons)[n] for n in norms if n in refused or n in reasons}
    errors = {
        norm: seen.errors[fold.module, norm.module]
        for fold in folds.values()
        for norm in (fold.before, fold.after)
        if norm is not None
    }
    return Plan(tuple(folds.values()), refused, errors)


def _both(behind: str, ahead: str | None) -> str:
    return behind if ahead is None else f"{behind}; {ahead}"


def _fold_behind(
    model: nn.Module,
    norms: list[NormLayer],
    found: Links,
    seen: _Measured,
    folds: dict[nn.Module, Fold],
) -> dict[NormLayer, str]:
    """Plan the norms behind convolutions; return why the others are not."""
    able, refused = list(norms), dict[NormLayer, str]()
    while True:
        candidates = find_candidates(model, able, found, seen.errors, only_where_it_pays=False)
        bad: dict[NormLayer, str] = {}
        for convolutions, group in candidates.groups:
            reason = next((r for c in convolutions if (r := _why_not_bake(c, found, seen))), None)
            if len(group) > 1:
                reason = "its convolution feeds another norm too"
            bad |= {norm: reason for norm in group if reason is not None}
        if not bad:
            break
        refused |= bad
        able = [norm for norm in able if norm not in bad]
    for convolutions, group in candidates.groups:
        for convolution in convolutions:
            folds.setdefault(convolution, seen.calls[convolution]).after = group[0]
    return refused | dict(candidates.refused)


def _fold_ahead(
    model: nn.Module,
    norms: list[NormLayer],
    found: Links,
    seen: _Measured,
    folds: dict[nn.Module, Fold],
) -> dict[NormLayer, str | None]:
    """Plan the norms before convolutions; return why not, or None where none comes after."""
    refused: dict[NormLayer, str | None] = {}
    inputs: dict[nn.Module, set[nn.Module | None]] = {}
    for output in found.outputs:
        for use in output.uses:
            if use.by is not None and is_convolutional(use.by):
                inputs.setdefault(use.by, set()).add(output.module)
    calls: dict[nn.Module, int] = {}
    for output in found.outputs:
        if is_convolutional(output.module):
            calls[output.module] = calls.get(output.module, 0) + 1
    for norm in norms:
        outputs = [output for output in found.outputs if output.module is norm.module]
        uses = [use for output in outputs for use in output.uses]
        users = [use.by for use in uses]
        layers = {user for user in users if user is not None and is_convolutional(user)}
        if not layers:
            refused[norm] = None
            continue
        reason = None
        if (other := next((use for use in uses if use.by not in layers), None)) is not None:
            reason = f"{other.what} uses its output too"
        elif any(output.is_kept for output in outputs):
            reason = "its output is returned or stored"
        if any(output.is_stale for output in outputs):
            reason = reason or "its input is written before the layer after it"
        if norm.family == "instance":
            reason = reason or "an instance norm takes inputs without a batch, too"
        for layer in layers:
            if plain_class(layer) is None:
                reason = reason or f"{type(layer).__name__} has a forward of its own"
            if inputs[layer] != {norm.module} or calls[layer] != users.count(layer):
                reason = reason or "the layer after it has other inputs too"
            error = seen.errors.get((layer, norm.module))
            if error is None or not error.is_right:
                reason = reason or f"the fold into the layer after it would be {error}"
            reason = reason or _why_not_bake(layer, found, seen)
            if "forward" in vars(layer) or layer._forward_pre_hooks:
                reason = reason or "a hook on the layer after it sees its input"
        if reason is not None:
            refused[norm] = reason
            continue
        for layer in layers:
            folds.setdefault(layer, seen.calls[layer]).before = norm
    return refused


def _why_not_bake(layer: nn.Module, found: Links, seen: _Measured) -> str | None:
    """Return why a layer's weight cannot be replaced, or None."""
    if layer in found.elsewhere:
        return f"{found.elsewhere[layer]} uses the weight of {type(layer).__name__} too"
    if layer not in seen.calls:
        return f"the calls of {type(layer).__name__} cannot be seen"
    computed = any(o.module is layer and not o.uses_own for o in found.outputs)
    if computed and plain_class(layer) is None:
        return f"{type(layer).__name__} computes its weight in a forward of its own"
    if computed and not all(isinstance(h, _BAKEABLE) for h in layer._forward_pre_hooks.values()):
        return f"a hook on {type(layer).__name__} would be lost with its weight"
    return None


# Hooks by which torch computes a weight from parameters alone.
_BAKEABLE = (WeightNorm, SpectralNorm, BasePruningMethod)


_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_PLAIN_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def plain_class(layer: nn.Module) -> Any:
    """Return torch's class of a layer that does what that class does, or None."""
    for kind in (*_PLAIN, *_PLAIN_TRANSPOSED):
        if isinstance(layer, kind):
            own = getattr(kind, "_conv_forward", None)
            same = type(layer).forward is kind.forward
            return kind if same and getattr(type(layer), "_conv_forward", None) is own else None
    return None


def is_computed(layer: nn.Module) -> bool:
    """Tell whether the weight or bias of a layer is none of its own parameters."""
    return parametrize.is_parametrized(layer) or "weight" not in layer._parameters


def _measure(
    seen: _Measured,
    call: Convolution,
    layer: nn.Module,
    norm: NormLayer,
    *,
    before: bool,
    x: Tensor | None = None,
) -> None:
    """Measure one fold on one call."""
    given, weight, bias = call.tensors()
    x = given if x is None else x
    fold = Fold(layer, weight.detach(), None if bias is None else bias.detach(), call.geometry)
    seen.calls.setdefault(layer, Fold(layer, fold.weight, fold.bias, fold.geometry))
    if norm.running_mean is None or norm.running_var is None:
        return
    fold.before, fold.after = (norm, None) if before else (None, norm)
    try:
        w, b, border = fold.weights()
    except OverflowError:
        nan = float("nan")
        seen.note(layer, norm.module, FoldError(nan, nan, nan, x.dtype))
        return
    geometry = call.geometry
    x = x.to(measured_in(x.dtype))
    with torch.autocast(x.device.type, enabled=False):
        folded = convolve(x, w.to(x.dtype), None if b is None else b.to(x.dtype), geometry)
        if border is not None:
            ones = torch.ones_like(x[:1, :1])
            folded = folded + convolve(ones, border.to(x.dtype), None, _ungrouped(geometry))
        plain = _two_layers(x, weight.to(x.dtype), bias, norm, geometry, before)
        exact = two_layers(x, weight, bias, constants_of(norm), geometry, before=before)
    seen.note(layer, norm.module, fold_error(folded.cpu(), plain.cpu(), exact))


def _two_layers(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: NormLayer,
    geometry: Geometry | None,
    before: bool,
) -> Tensor:
    given = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if x.dtype == torch.float32:  # of what is in float64, too
        given = tuple(None if t is None else t.float() for t in given)  # type: ignore[assignment]

    def normalize(z: Tensor) -> Tensor:
        return F.batch_norm(z, *given, False, 0.0, norm.eps)

    bias = None if bias is None else bias.to(x.dtype)
    if before:
        return convolve(normalize(x), weight, bias, geometry)
    return normalize(convolve(x, weight, bias, geometry))
