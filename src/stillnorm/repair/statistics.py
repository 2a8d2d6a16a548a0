"""Repairs of what single layers hold: statistics that are something else than their names say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from stillnorm.errors import RepairError
from stillnorm.norms import Layers, NormLayer, must_be_a_model, select
from stillnorm.norms.adapters.keras import FOREIGN
from stillnorm.repair.report import Written, left_alone
from stillnorm.repair.surgery import Surgery
from stillnorm.reports import Block, Document, Line, Table
from stillnorm.reports.numbers import count

Held = Literal["deviation", "inverse", "inverse deviation"]


@dataclass(frozen=True, eq=False)
class RepairReport(Written):
    """What a repair of single layers did.

    Args:
        repaired: (path, what was done) of each layer that was changed.
        refused: (path, reason) of layers that were left alone and should not be as they are.
    """

    repaired: tuple[tuple[str, str], ...]
    refused: tuple[tuple[str, str], ...]
    _surgery: Surgery = field(repr=False)

    def undo(self) -> None:
        """Put everything back, bit for bit."""
        self._surgery.undo()

    def document(self) -> Document:
        """Return the report as a document."""
        blocks: list[Block] = []
        if self.repaired:
            rows = tuple((path or "(root)", what) for path, what in self.repaired)
            blocks += [Line(""), Table(("repaired", "what"), rows, "ll")]
        blocks += left_alone(self.refused)
        return Document(f"{count(len(self.repaired), 'layer')} repaired", tuple(blocks))


# Does one layer under surgery; returns what it did, or None where there is nothing to do.
_Repair = Callable[[NormLayer, Surgery], str | None]


class _Refusal(Exception):
    """Raised by the repair of one layer that cannot be done."""


def _repaired(model: nn.Module, layers: Layers, repair: _Repair) -> RepairReport:
    """Repair every layer that needs it: all of them or, if anything is raised, none."""
    done: list[tuple[str, str]] = []
    refused: list[tuple[str, str]] = []
    with Surgery() as surgery:
        for layer in select(model, layers):
            part = surgery.part()
            try:
                what = repair(layer, part)
            except _Refusal as reason:
                part.undo()
                refused.append((layer.path, str(reason)))
            else:
                done += [] if what is None else [(layer.path, what)]
        return RepairReport(tuple(done), tuple(refused), surgery)


def convert_variance(model: nn.Module, held: Held | float, layers: Layers = None) -> RepairReport:
    r"""Make a variance of what `running_var` holds instead.

    For statistics that come from elsewhere:

    - "deviation": σ, as some libraries keep it; becomes σ².
    - "inverse deviation": 1 / sqrt(σ² + ε), as a fused kernel keeps it; becomes σ².
    - "inverse": 1 / (σ² + ε), a precision; becomes σ².
    - a number: what the variance has to be multiplied by; n / (n - 1) makes torch's unbiased
      variance of a biased one.

    Args:
        model: The model.
        held: What `running_var` holds now.
        layers: Which layers; see `select`. Default: all that have statistics.

    Returns:
        Which layers were repaired; which were not, and why; `undo()`.

    Raises:
        RepairError: `held` is not one of these, or a number that is not positive.
        SelectorError: `layers` matches nothing.

    Mutates:
        `running_var`, in place, computed in float64: all layers or, if anything is raised, none.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> _ = net.running_var.copy_(torch.tensor([3.0, 0.5]))
        >>> _ = convert_variance(net, "deviation")
        >>> net.running_var.tolist()
        [9.0, 0.25]
    """
    if isinstance(held, str):
        if held not in ("deviation", "inverse", "inverse deviation"):
            raise RepairError(
                f"held={held!r} is nothing that a running_var is known to hold",
                help='"deviation", "inverse", "inverse deviation", or a factor',
            )
    elif not 0 < held < float("inf"):
        raise RepairError(f"held={held}: a factor must be positive", help="n / (n - 1), say")

    def repair(layer: NormLayer, surgery: Surgery) -> str | None:
        var = layer.running_var
        if var is None:
            return None
        new = variance_of(var.double(), held, layer.eps).to(var.dtype)
        if not new.isfinite().all() or (new < 0).any() or (var < 0).any():
            raise _Refusal(
                "what it holds gives no variance: some channels would not be finite, or negative"
            )
        surgery.write(var, new)
        return f"running_var from {held if isinstance(held, str) else f'1 / {held:g} of it'}"

    return _repaired(model, layers, repair)


def variance_of(x: Tensor, held: Held | float, eps: float) -> Tensor:
    """Return the variance where `running_var` holds something else."""
    if held == "deviation":
        return x.square()
    if held == "inverse deviation":
        return (x.square().reciprocal() - eps).clamp_min(0)
    if held == "inverse":
        return (x.reciprocal() - eps).clamp_min(0)
    return x * float(held)


def clamp_variance(
    model: nn.Module, layers: Layers = None, *, minimum: float = 0.0
) -> RepairReport:
    """Raise variances below a minimum to it: negative ones, which make NaN of the output.

    Args:
        model: The model.
        layers: Which layers; see `select`.
        minimum: The smallest variance allowed.

    Returns:
        Which layers were repaired, in how many channels; `undo()`. Layers with NaN or infinity in
        their statistics are refused: nothing says what they were.

    Raises:
        RepairError: The minimum is negative.
        SelectorError: `layers` matches nothing.

    Mutates:
        `running_var`, in place: all layers or, if anything is raised, none.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> net.running_var[1] = -1e-9
        >>> clamp_variance(net).repaired
        (('', 'running_var of 1 channel raised to 0'),)
    """
    if not 0 <= minimum < float("inf"):
        raise RepairError(f"minimum={minimum} is no variance", help="0, or a small positive number")

    def repair(layer: NormLayer, surgery: Surgery) -> str | None:
        mean, var = layer.running_mean, layer.running_var
        if mean is None or var is None:
            return None
        if not (mean.isfinite() & var.isfinite()).all():
            raise _Refusal("has NaN or infinity in its statistics: recalibrate it, or reset it")
        low = int((var < minimum).sum())
        if not low:
            return None
        surgery.write(var, var.detach().clamp_min(minimum))
        return f"running_var of {count(low, 'channel')} raised to {minimum:g}"

    return _repaired(model, layers, repair)


def reset_statistics(model: nn.Module, layers: Layers = None) -> RepairReport:
    """Give layers the statistics of a new layer: mean 0, variance 1, no batch seen.

    To be followed by `recalibrate` or by training: in eval mode a reset layer normalises nothing.

    Args:
        model: The model.
        layers: Which layers; see `select`.

    Returns:
        Which layers were reset; `undo()`.

    Raises:
        SelectorError: `layers` matches nothing.

    Mutates:
        The statistics, in place: all layers or, if anything is raised, none.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> _ = net(torch.randn(8, 2))
        >>> reset_statistics(net).repaired, int(net.num_batches_tracked)
        ((('', 'statistics reset'),), 0)
    """

    def repair(layer: NormLayer, surgery: Surgery) -> str | None:
        values = {"running_mean": 0, "running_var": 1, "num_batches_tracked": 0}
        found = {name: t for name, t in layer.tensors().items() if name in values}
        for name, tensor in found.items():
            surgery.write(tensor, torch.full_like(tensor, values[name]))
        return "statistics reset" if found else None

    return _repaired(model, layers, repair)


def to_float32(model: nn.Module, layers: Layers = None) -> RepairReport:
    """Cast norm layers of half precision to float32 as a whole.

    Parameters and statistics together: a layer with one kind in half precision and the other in
    float32 fails with "expected scalar type Half but found Float". What is normalised may be of
    half precision, and comes out so.

    Args:
        model: The model.
        layers: Which layers; see `select`.

    Returns:
        Which layers were cast; `undo()`, to the very bits.

    Raises:
        SelectorError: `layers` matches nothing.

    Mutates:
        The memory of the layers' parameters and buffers; the objects stay the same.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).half()
        >>> to_float32(net).repaired
        (('1', '4 tensors to float32'),)
        >>> net.eval()(torch.randn(2, 4).half()).dtype
        torch.float16
    """
    must_be_a_model(model)
    uses = _uses(model)

    def repair(layer: NormLayer, surgery: Surgery) -> str | None:
        half = [t for t in _own(layer.module) if t.dtype in (torch.float16, torch.bfloat16)]
        if half and layer.family == "keras":
            raise _Refusal(FOREIGN)
        own = sum(1 for _ in layer.module.modules())
        if any(uses[id(t)] > 1 and own == 1 for t in half):
            raise _Refusal("shares a tensor with another layer, which would be cast too")
        for tensor in half:
            grad = tensor.grad if tensor.is_leaf else None
            surgery.set_grad(tensor, None)  # it must be of the dtype that the tensor has
            surgery.set_data(tensor, tensor.detach().float())
            surgery.set_grad(tensor, None if grad is None else grad.float())
        return f"{count(len(half), 'tensor')} to float32" if half else None

    return _repaired(model, layers, repair)


def _own(module: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a layer and of what is in it (parametrizations)."""
    return [*module.parameters(), *module.buffers()]


def _uses(model: nn.Module) -> Counter[int]:
    """Count in how many modules each parameter is registered."""
    return Counter(
        id(p) for module in model.modules() for p in module._parameters.values() if p is not None
    )


def clone_inference_tensors(model: nn.Module, layers: Layers = None) -> RepairReport:
    """Replace tensors that were made under `torch.inference_mode` by ordinary ones.

    Such a tensor cannot be updated in place outside, nor saved for backward. It cannot be made an
    ordinary one either: the layer gets a new tensor with its values, and an optimizer that holds
    the old parameter has to be given the new one.

    Args:
        model: The model.
        layers: Which layers; see `select`.

    Returns:
        Which layers were repaired; `undo()`.

    Raises:
        SelectorError: `layers` matches nothing.

    Mutates:
        Which tensors are the layers' parameters and buffers.

    Example:
        >>> with torch.inference_mode():
        ...     net = nn.BatchNorm1d(2, affine=False)
        >>> clone_inference_tensors(net).repaired
        (('', 'running_mean, running_var, num_batches_tracked made ordinary'),)
    """
    new: dict[int, Tensor] = {}

    def repair(layer: NormLayer, surgery: Surgery) -> str | None:
        old = {id(t): t for t in _own(layer.module) if t.is_inference() and id(t) not in new}
        if old and layer.family == "keras":
            raise _Refusal(FOREIGN)
        with torch.inference_mode(False):
            for key, tensor in old.items():
                made = tensor.clone()
                is_parameter = isinstance(tensor, nn.Parameter)
                new[key] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
        names: dict[str, None] = {}
        for module in model.modules():  # wherever it is registered: ties stay ties
            for registered in (module._parameters, module._buffers):
                for name, found in list(registered.items()):
                    if found is not None and id(found) in old:
                        surgery.set_item(registered, name, new[id(found)])
                        names[name] = None
        return f"{', '.join(names)} made ordinary" if names else None

    return _repaired(model, layers, repair)
