"""The verb `fold`: a new model for inference, with the norms folded away."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from stillnorm.errors import StateError
from stillnorm.folding.border import with_border
from stillnorm.folding.inference import Fold, Plan, is_computed, plain_class, plan_fold
from stillnorm.folding.remainder import remainder
from stillnorm.folding.report import FoldReport
from stillnorm.folding.training import Example
from stillnorm.holding import part_unheld, release
from stillnorm.norms import NormLayer, find_norms
from stillnorm.tracing.batches import tensors_in
from stillnorm.tracing.calling import Forward
from stillnorm.tracing.flow import looking
from stillnorm.tracing.links import links


def fold(model: nn.Module, example: object, *, forward: Forward | None = None) -> FoldReport:
    r"""Make a new model for inference in which convolutions have absorbed their norms.

    .. math:: \frac{(Wx + b) - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta = (W s) x + b',
              \quad s = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}},
              \quad b' = (b - \mu) s + \beta

    Norms behind a convolution or linear layer fold, and norms directly before one, zero padding
    included. Who feeds whom is seen on the example, not guessed from the order of declaration. The
    arithmetic is in float64, rounded once. The result is made of plain torch layers: it loads,
    pickles and exports without stillnorm. Where the norm had an activation inside (timm), that
    stays in its place.

    Args:
        model: The model. Its norms are folded as they are in eval mode.
        example: An input, as `torch.export` takes it: a tensor, a tuple of positional arguments,
            a mapping of keyword arguments.
        forward: ``(model, example) -> output``, where the model cannot be called on the example.

    Returns:
        The new model in eval mode, the norms that are gone, those that stay with the reason, and
        the measured errors. A norm is folded only if, on its own input and against float64, the
        root mean square error is at most twice that of the two layers plus 4 ulp.

    Raises:
        BatchError: The model cannot be called on the example.
        StateError: The model has lazy modules, or the folded model does not run as the other does.

    Mutates:
        Nothing: the model given stays as it is.

    Cost:
        A copy of the model, three forwards on the example, and each folded layer's in float64.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> report = fold(net, torch.randn(2, 3, 8, 8))
        >>> report.folded, report.model
        (('1',), Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        ))

    Source: the need, pytorch/pytorch#104593, #180995 and #119264, where folds that go by the order
    or by the sizes of layers are wrong.
    """
    given = Example(example, forward)
    barred: dict[int, str] = {}  # by number among modules(): the layer changes from copy to copy
    while True:
        folded = _plain_copy(model)
        paths = [norm.path for norm in find_norms(folded)]
        with looking(folded):
            expected = given.run(folded)
            plan = plan_fold(folded, partial(given.run, folded))
        numbers = _numbers(folded, plan)
        built = _build(folded, plan, numbers, barred)
        with looking(folded):
            output, ignored = _run(folded, built, given)
        if not ignored:
            break
        barred |= ignored
    refused = {norm.path: why for norm, why in plan.refused.items()}
    for one, number in zip(plan.folds, numbers, strict=True):
        if number in barred:
            refused |= {norm.path: barred[number] for norm in _norms_of(one)}
    max_error = _must_agree(output, expected)
    return FoldReport(
        model=folded,
        folded=tuple(path for path in paths if path not in refused),
        refused=tuple((path, refused[path]) for path in paths if path in refused),
        max_error=max_error,
        errors={n.path: e for n, e in plan.errors.items() if n.path not in refused},
    )


def _plain_copy(model: nn.Module) -> nn.Module:
    """Copy the model without what wraps it, released from all holds, in eval mode."""
    while True:
        if isinstance(model, DataParallel | DistributedDataParallel):
            model = model.module
        elif isinstance(original := getattr(model, "_orig_mod", None), nn.Module):
            model = original
        else:
            break
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


def _norms_of(one: Fold) -> tuple[NormLayer, ...]:
    return tuple(norm for norm in (one.before, one.after) if norm is not None)


def _numbers(model: nn.Module, plan: Plan) -> list[int]:
    """Number the layers that fold as `modules()` does: copies of a model agree in that."""
    order = {module: number for number, module in enumerate(model.modules())}
    return [order[one.module] for one in plan.folds]


def _build(
    model: nn.Module, plan: Plan, numbers: list[int], barred: dict[int, str]
) -> dict[int, nn.Module]:
    """Fold in place, in a copy of our own; return the layers that absorbed norms.

    A layer that shares a norm with a barred one is barred, too.
    """
    numbered = list(zip(plan.folds, numbers, strict=True))
    while True:
        kept = {norm for one, number in numbered if number in barred for norm in _norms_of(one)}
        new = [n for one, n in numbered if n not in barred and kept & set(_norms_of(one))]
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
        for norm in _norms_of(one):
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


def _must_agree(output: object, expected: object) -> float:
    """Return the largest relative difference of two outputs.

    Raises:
        StateError: They are not outputs of one function: more apart than rounding can explain.
    """
    worst = 0.0
    for a, b in zip(tensors_in(output), tensors_in(expected), strict=True):
        if not (a.is_floating_point() and b.numel()):
            continue
        eps = torch.finfo(b.dtype).eps
        finite = b.isfinite()
        if not bool(finite.any()):
            continue
        a, b = a[finite].double(), b[finite].double()
        error = float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))
        if not error <= 16 * eps**0.5:
            raise StateError(
                f"the folded model's output is off by {error:.2g} of its largest value",
                help="every norm that folded is right on its own input; please report this model",
            )
        worst = max(worst, error)
    return worst
