"""A folded copy of a model: layers that have absorbed their norms, and what is left of those."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stillnorm.errors import StateError
from stillnorm.folding.border import with_border
from stillnorm.folding.inference import Fold, Plan, is_computed, plain_class, plan_fold
from stillnorm.folding.remainder import remainder
from stillnorm.folding.training import Example
from stillnorm.holding import part_unheld, release
from stillnorm.norms import NormLayer, find_norms, walk
from stillnorm.tracing.flow import looking
from stillnorm.tracing.links import links


@dataclass(frozen=True, eq=False)
class FoldedCopy:
    """A folded copy of a model, run on an example.

    Args:
        model: The copy.
        plan: What folds in it.
        numbered: Each fold with the number of its layer among `modules()`.
        barred: By number, why a fold was not made.
        paths: The paths of the norms that there were.
        output: The copy's output.
        expected: Its output before it was folded.
    """

    model: nn.Module
    plan: Plan
    numbered: list[tuple[Fold, int]]
    barred: dict[int, str]
    paths: tuple[str, ...]
    output: object
    expected: object


def fold_copy(
    model: nn.Module,
    example: Example,
    barred: dict[int, str],
    dtype: torch.dtype | None = None,
) -> FoldedCopy:
    """Copy a model, fold the copy and run it.

    Args:
        model: The model.
        example: The example.
        barred: By number of a layer among `modules()`, in which copies agree: why not to fold it.
        dtype: What to cast the copy to.

    Raises:
        StateError: The model cannot be copied, or the folded copy does not run.
    """
    barred = dict(barred)
    while True:
        copied = plain_copy(model)
        if dtype is not None:
            copied.to(dtype)
        paths = tuple(norm.path for norm in find_norms(copied))
        with looking(copied):
            expected = example.run(copied)
            plan = plan_fold(copied, partial(example.run, copied))
        numbered = _numbered(copied, plan)
        built = _build(copied, numbered, barred)
        with looking(copied):
            output, ignored = _run(copied, built, example)
        if not ignored:
            return FoldedCopy(copied, plan, numbered, barred, paths, output, expected)
        barred |= ignored


def plain_copy(model: nn.Module) -> nn.Module:
    """Copy the model without what wraps it, released from all holds, in eval mode.

    Raises:
        StateError: It cannot be copied, or the copy would run the original.
    """
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            break
    for path, module, _ in walk(model):
        if reason := _why_not_copy(module):
            raise StateError(
                f"{path or type(model).__name__} {reason}",
                help="fold the model before that is done",
            )
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise StateError(
            f"{type(model).__name__} cannot be copied: {error}",
            help="does a module keep a tensor of a forward with gradients? run it under no_grad",
        ) from error
    for norm in find_norms(copied):
        if norm.hold is not None:
            release(norm.module)
    part_unheld(copied, [])
    return copied.eval()


def _why_not_copy(module: nn.Module) -> str | None:
    if isinstance(module, torch.jit.ScriptModule):
        return "is TorchScript's: its layers cannot be replaced"
    forward = vars(module).get("forward")
    if forward is not None and not isinstance(forward, MethodType):
        return "has a forward replaced on the instance: a copy would run the original"
    if any(
        tensor.is_meta
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if isinstance(tensor, Tensor)
    ):
        return "is on the meta device: it has no values"
    return None


def norms_of(one: Fold) -> tuple[NormLayer, ...]:
    """Return the norms that a layer absorbs."""
    return tuple(norm for norm in (one.before, one.after) if norm is not None)


def _numbered(model: nn.Module, plan: Plan) -> list[tuple[Fold, int]]:
    order = {module: number for number, module in enumerate(model.modules())}
    return [(one, order[one.module]) for one in plan.folds]


def _build(
    model: nn.Module, numbered: list[tuple[Fold, int]], barred: dict[int, str]
) -> dict[int, nn.Module]:
    """Fold in place, in a copy of our own; return the layers that absorbed norms.

    A layer that shares a norm with a barred one is barred, too.
    """
    for one, number in numbered:
        try:
            one.weights()
        except OverflowError as error:
            barred.setdefault(number, str(error))
    while True:
        kept = {norm for one, number in numbered if number in barred for norm in norms_of(one)}
        new = [n for one, n in numbered if n not in barred and kept & set(norms_of(one))]
        if not new:
            break
        barred |= dict.fromkeys(new, "it shares a norm with a layer that cannot fold")
    built: dict[int, nn.Module] = {}
    instead: dict[nn.Module, nn.Module] = {}
    for one, number in numbered:
        if number in barred:
            continue
        weight, bias, border = one.weights()
        layer = built[number] = _with_weights(one.module, weight, bias)
        if border is not None and one.geometry is not None:
            instead[one.module] = with_border(layer, border, one.geometry)
        elif layer is not one.module:
            instead[one.module] = layer
        for norm in norms_of(one):
            instead[norm.module] = remainder(norm.module)
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None and child in instead:
                module._modules[name] = instead[child]
    model.eval()
    return built


def _with_weights(layer: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Give a layer other weights: itself, or a plain one where its own are computed."""
    if is_computed(layer):
        kind = plain_class(layer)
        sizes = (
            (layer.in_features, layer.out_features)
            if kind is nn.Linear
            else (layer.in_channels, layer.out_channels, layer.kernel_size)
        )
        settings = {} if kind is nn.Linear else _settings(layer)
        layer = nn.utils.skip_init(kind, *sizes, bias=bias is not None, **settings)  # type: ignore[no-untyped-call]
    learns = any(p.requires_grad for p in layer.parameters())
    layer.weight = nn.Parameter(weight, requires_grad=learns)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=learns)
    return layer  # type: ignore[no-any-return]


def _settings(layer: Any) -> dict[str, Any]:
    names = ["stride", "padding", "dilation", "groups", "padding_mode"]
    if layer.transposed:
        names.append("output_padding")
    return {name: getattr(layer, name) for name in names}


def _run(
    model: nn.Module, built: dict[int, nn.Module], example: Example
) -> tuple[object, dict[int, str]]:
    """Run the folded model; return its output and the layers that do not use their new weights.

    Raises:
        StateError: It does not run.
    """
    outputs: list[object] = []
    try:
        seen = links(model, (), lambda: outputs.append(example.run(model)))
    except Exception as error:
        raise StateError(
            f"the folded model raises {type(error).__name__}: {error}",
            help="its code needs a layer that was folded away; nothing was changed",
        ) from error
    own = {output.module for output in seen.outputs if output.uses_own}
    foreign = {output.module for output in seen.outputs if not output.uses_own}
    ignored = {
        number: f"the forward of {type(layer).__name__} does not use the weight or bias it is given"
        for number, layer in built.items()
        if layer not in own or layer in foreign
    }
    return outputs[0], ignored
