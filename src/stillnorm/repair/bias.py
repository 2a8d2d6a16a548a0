r"""Absorbing biases that a norm takes away again.

A batch norm subtracts the mean of what it receives, and with it any constant that the layer before
has added. In train mode such a bias does nothing: its gradient is zero up to rounding. In eval mode
it is part of the running mean:

    y = (z + b - μ) s + β  =  (z - (μ - b)) s + β
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillnorm.errors import BatchError, StateError
from stillnorm.holding.folding import is_convolutional
from stillnorm.norms import Layers, NormLayer, find_norms, select, walk
from stillnorm.repair.statistics import RepairReport
from stillnorm.repair.surgery import Surgery, refuse_wrapped
from stillnorm.state import eval_mode, preserved
from stillnorm.tracing import (
    Forward,
    call_example,
    copied,
    eager,
    first_line,
    looking,
    strangers_kept,
    tensors_in,
)
from stillnorm.tracing.links import Links, Output, links

# How far the eval output may move, relative to its largest value: rounding, in eps of its dtype.
_ROUNDING = 256


def absorb_bias(
    model: nn.Module,
    example: object,
    layers: Layers = None,
    *,
    forward: Forward | None = None,
) -> RepairReport:
    """Move biases of convolutions and linear layers into the running means of the norms after them.

    The bias of a layer whose output goes to a batch norm and nowhere else does nothing in training;
    it costs a parameter, an optimizer state, and it makes a running mean of a large offset. It is
    subtracted from the running mean and removed. Both modes compute what they did, up to rounding.

    Args:
        model: The model.
        example: What `torch.export` takes: a tensor, a tuple of arguments, a mapping. It shows who
            feeds whom.
        layers: Before which norms; see `select`.
        forward: ``(model, example) -> output``, where that is not the call.

    Returns:
        (path of the layer, into which norm) of each bias; which biases before norms were left
        alone, and why; `undo()`.

    Raises:
        StateError: The model is wrapped for distributed training; or its output in eval mode moves
            by more than rounding.
        BatchError: The example does not fit the model, or has too few samples for train mode.
        SelectorError: `layers` matches nothing.

    Mutates:
        `running_mean` of the norms, in place; the layers' `bias` is None, as if they had been made
        with ``bias=False``. All of them or, if anything is raised, none. An optimizer keeps the
        biases as orphans: see `repair_optimizer`.

    Cost:
        Four forwards of the example, one of them in train mode.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> absorb_bias(net, torch.randn(16, 4)).repaired
        (('0', 'bias into 1'),)
        >>> net[0].bias is None
        True
    """
    found, refused = absorbable_biases(model, example, layers, forward=forward)
    before = _output(model, example, forward)
    with Surgery() as surgery:
        for one in found:
            mean = one.norm.tensors()["running_mean"]
            surgery.write(mean, (mean.double() - one.bias.detach().double()).to(mean.dtype))
            surgery.set_item(one.module._parameters, "bias", None)
        if found:
            _must_agree(before, _output(model, example, forward))
        repaired = tuple((one.path, f"bias into {one.norm.path}") for one in found)
        return RepairReport(repaired, refused, surgery)


@dataclass(frozen=True, eq=False)
class Absorbable:
    """A bias that a norm takes away again.

    Args:
        path: The path of the layer that has it.
        module: That layer.
        bias: The bias.
        norm: The norm after it.
    """

    path: str
    module: nn.Module
    bias: Tensor
    norm: NormLayer


def absorbable_biases(
    model: nn.Module,
    example: object,
    layers: Layers = None,
    *,
    forward: Forward | None = None,
) -> tuple[tuple[Absorbable, ...], tuple[tuple[str, str], ...]]:
    """Find the biases that `absorb_bias` would move, changing nothing.

    Args:
        model: The model.
        example: See `absorb_bias`, as of `layers` and `forward`.
        layers: Before which norms.
        forward: ``(model, example) -> output``.

    Returns:
        The biases; and (path, reason) of those before norms that have to stay.

    Raises:
        StateError: The model is wrapped for distributed training.
        BatchError: The example has too few samples for train mode.
    """
    refuse_wrapped(model)
    norms, chosen = find_norms(model), {norm.module for norm in select(model, layers)}
    ways = [_links(model, norms, example, forward, training) for training in (False, True)]
    found: list[Absorbable] = []
    refused: list[tuple[str, str]] = []
    by_module = {norm.module: norm for norm in norms}
    owners = _owners(model)
    for path, module, _ in {m: (p, m, a) for p, m, a in walk(model)}.values():
        bias = getattr(module, "bias", None) if is_convolutional(module) else None
        after = _norms_after(_outputs_of(module, ways[0]), by_module)
        if bias is None or not after or after[0].module not in chosen:
            continue
        norm = after[0]
        reasons = (_why_not(module, seen, norm, by_module, owners) for seen in ways)
        reason = next((reason for reason in reasons if reason is not None), None)
        if reason is None:
            found.append(Absorbable(path, module, bias, norm))
        else:
            refused.append((path, reason))
    return tuple(found), tuple(refused)


def _norms_after(
    outputs: Iterable[Output], norms: Mapping[nn.Module, NormLayer]
) -> list[NormLayer]:
    """Return the norms with statistics that take the outputs."""
    users = dict.fromkeys(use.by for output in outputs for use in output.uses)
    found = (norms[user] for user in users if user is not None and user in norms)
    return [norm for norm in found if norm.has_statistics and norm.family == "batch"]


def _links(
    model: nn.Module,
    norms: Collection[NormLayer],
    example: object,
    forward: Forward | None,
    training: bool,
) -> Links:
    """See who feeds whom in one mode: there are things that act in training only."""
    # Not `looking`: it keeps the statistics from norms in train mode, by which they are known.
    with preserved(model), torch.no_grad(), eager():
        model.train(training)
        try:
            return links(model, norms, lambda: call_example(model, copied(example), forward))
        except ValueError as error:
            if not training:
                raise
            raise BatchError(
                f"in train mode the model does not take the example: {first_line(error)}",
                help="an example of several samples shows what train mode does",
            ) from error


def _outputs_of(module: nn.Module, seen: Links) -> list[Output]:
    return [output for output in seen.outputs if output.module is module]


def _why_not(
    module: nn.Module,
    seen: Links,
    norm: NormLayer,
    norms: Mapping[nn.Module, NormLayer],
    owners: Mapping[int, int],
) -> str | None:
    """Return why the bias has to stay, or None."""
    outputs = _outputs_of(module, seen)
    after = _norms_after(outputs, norms)
    if after != [norm]:
        return f"its output goes elsewhere than to {norm.path}, if only in train mode"
    if module in seen.elsewhere:
        return f"its weight or bias is used by {seen.elsewhere[module]} too"
    if "bias" not in module._parameters:
        return "its bias is parametrized"
    users = [[use.by for use in output.uses] for output in outputs]
    if any(found != [norm.module] for found in users) or any(output.is_kept for output in outputs):
        return f"its output is used by somebody else than {norm.path}"
    if any(source not in outputs for source in seen.sources[norm.module]):
        return f"{norm.path} receives something else too"
    if not all(output.uses_own for output in outputs):
        return "its forward does not use its bias as it is"
    if owners.get(id(module._parameters["bias"]), 0) > 1:
        return "its bias is another layer's too"
    if norm.is_scripted or not norm.tensors()["running_mean"].is_floating_point():
        return f"{norm.path} is TorchScript's"
    return None


def _owners(model: nn.Module) -> dict[int, int]:
    """Return how many modules have each parameter."""
    found: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                found[id(parameter)] = found.get(id(parameter), 0) + 1
    return found


def _output(model: nn.Module, example: object, forward: Forward | None) -> list[Tensor]:
    with looking(model), strangers_kept(model), eval_mode(model):
        return list(tensors_in(call_example(model, copied(example), forward)))


def _must_agree(before: list[Tensor], after: list[Tensor]) -> None:
    for a, b in zip(before, after, strict=True):
        if not a.numel():
            continue
        if a.is_complex():
            a, b = torch.view_as_real(a), torch.view_as_real(b)
        if not a.is_floating_point():
            if not torch.equal(a, b):
                raise StateError(
                    "without the biases an output of integers is another",
                    help="something that no trace sees uses the layer; nothing was changed",
                )
            continue
        same = torch.equal(a.isfinite(), b.isfinite())
        a, b = a.where(a.isfinite(), 0), b.where(b.isfinite(), 0)
        far = float((a.double() - b.double()).abs().max()) if same else math.inf
        if not far <= _ROUNDING * torch.finfo(a.dtype).eps * float(a.double().abs().max()):
            raise StateError(
                f"without the biases the output in eval mode moves by {far:.3g}",
                help="a mean of many deviations loses them in rounding; nothing was changed",
            )
