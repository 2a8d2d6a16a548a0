"""Repairing what an optimizer holds of a model: parameters that are gone, gradients left over."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from stillnorm.errors import StateError
from stillnorm.norms import Layers, select
from stillnorm.repair.report import Written
from stillnorm.repair.surgery import Surgery
from stillnorm.reports import Block, Document, Line, Table
from stillnorm.reports.numbers import count
from stillnorm.state.record import AFFINE, dotted


@dataclass(frozen=True)
class RepairedGroup:
    """What became of one parameter group.

    Args:
        removed: The number of parameters that are not the model's and were removed.
        kept: The number of those that stay.
        states: How many of the removed had state, which is removed too.
    """

    removed: int
    kept: int
    states: int


@dataclass(frozen=True, eq=False)
class OptimizerReport(Written):
    """What `repair_optimizer` did.

    Args:
        groups: What became of each parameter group, in the optimizer's order.
        missing: Names of the model's parameters that require gradients and are in no group: no
            step of this optimizer trains them.
    """

    groups: tuple[RepairedGroup, ...]
    missing: tuple[str, ...]
    _surgery: Surgery = field(repr=False)

    @property
    def removed(self) -> int:
        """The number of parameters removed, of all groups."""
        return sum(group.removed for group in self.groups)

    def undo(self) -> None:
        """Put parameters and state back, the same objects in the same order."""
        self._surgery.undo()

    def document(self) -> Document:
        """Return the report as a document."""
        blocks: list[Block] = []
        if self.removed:
            rows = tuple(
                (str(i), str(group.removed), str(group.states), str(group.kept))
                for i, group in enumerate(self.groups)
            )
            header = ("group", "removed", "with state", "kept")
            blocks += [Line(""), Table(header, rows, "lrrr")]
        if self.missing:
            blocks += [Line(""), Line(f"in no group, not trained: {', '.join(self.missing)}")]
        head = f"{count(self.removed, 'parameter')} removed from the optimizer"
        return Document(head, tuple(blocks))


@dataclass(frozen=True, eq=False)
class GradientReport(Written):
    """What `drop_stale_gradients` did.

    Args:
        dropped: Names of the parameters whose gradient was dropped.
    """

    dropped: tuple[str, ...]
    _surgery: Surgery = field(repr=False)

    def undo(self) -> None:
        """Put the gradients back, the same tensors."""
        self._surgery.undo()

    def document(self) -> Document:
        """Return the report as a document."""
        blocks = (Line(", ".join(self.dropped)),) if self.dropped else ()
        return Document(f"{count(len(self.dropped), 'stale gradient')} dropped", blocks)


def repair_optimizer(model: nn.Module, optimizer: Optimizer) -> OptimizerReport:
    """Remove from an optimizer the parameters that the model no longer has, with their state.

    After layers were replaced, the optimizer still holds the parameters of the old ones: memory for
    them and for their moments, weight decay on nobody's weights, a state dict that fits no new
    optimizer, and a gradient norm that counts what is not trained. Nothing is added: what the model
    has and the optimizer lacks is named in `.missing`, and
    ``optimizer.add_param_group({"params": ...})`` adds it.

    Args:
        model: The model with everything that this optimizer trains: where that is more than one
            module (a loss with parameters, a second network), ``nn.ModuleList([model, loss])``.
        optimizer: The optimizer, warm or new. Groups stay, also empty ones, with their options;
            schedulers hold on to them by number.

    Returns:
        How many were removed from each group; `undo()`.

    Raises:
        StateError: `optimizer` is none; no parameter of it is the model's; it keeps one state of
            all parameters together (an `LBFGS` that has stepped), or the parameters in a second
            list (`ZeroRedundancyOptimizer`).

    Mutates:
        The lists ``group["params"]`` and, where there are names, ``group["param_names"]``, in
        place, and `optimizer.state`: all of it or, if anything is raised, none. State and options
        of what stays are the same objects.

    Cost:
        One look at each parameter.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> optimizer = torch.optim.AdamW(net.parameters())
        >>> net[1] = nn.GroupNorm(2, 8)
        >>> report = repair_optimizer(net, optimizer)
        >>> report.removed, report.missing
        (2, ('1.weight', '1.bias'))
        >>> report.undo()
        >>> len(optimizer.param_groups[0]["params"])
        4
    """
    if not isinstance(optimizer, Optimizer):
        raise StateError(
            f"a {type(optimizer).__name__} is not a torch.optim.Optimizer",
            help="give the optimizer itself, not its wrapper or scheduler",
        )
    own = {id(parameter) for parameter in model.parameters()}
    listed = [list(group["params"]) for group in optimizer.param_groups]
    held = {id(parameter) for parameters in listed for parameter in parameters}
    orphans = [[p for p in parameters if id(p) not in own] for parameters in listed]
    gone = [parameter for parameters in orphans for parameter in parameters]
    if gone:
        _refuse(optimizer, own & held, gone)
    report = OptimizerReport(
        groups=tuple(
            RepairedGroup(
                removed=len(removed),
                kept=len(parameters) - len(removed),
                states=sum(parameter in optimizer.state for parameter in removed),
            )
            for parameters, removed in zip(listed, orphans, strict=True)
        ),
        missing=tuple(
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in held
        ),
        _surgery=Surgery(),
    )
    with report._surgery as surgery:
        for group, removed in zip(optimizer.param_groups, orphans, strict=True):
            if removed:
                _cut(surgery, optimizer, group, own)
        _forget(surgery, optimizer, gone)
        return report


def _refuse(optimizer: Optimizer, kept: set[int], gone: list[Tensor]) -> None:
    """Raise where the parameters cannot be removed, or should not be."""
    name = type(optimizer).__name__
    if not kept:
        raise StateError(
            f"none of the {count(len(gone), 'parameter')} in the {name} is the model's",
            help="give the model that it trains (a copy has other parameters)",
        )
    if isinstance(optimizer, LBFGS) and optimizer.state:
        raise StateError(
            f"{name} keeps one history of all parameters in a row, which cannot be cut",
            help=f"make a new {name}; nothing was changed",
        )
    lists = {id(group["params"]) for group in optimizer.param_groups}
    for inner in vars(optimizer).values():
        if isinstance(inner, Optimizer) and any(
            id(group["params"]) not in lists for group in inner.param_groups
        ):
            raise StateError(
                f"{name} holds another optimizer, {type(inner).__name__}, with lists of its own",
                help=f"make a new {name}; nothing was changed",
            )


def _cut(surgery: Surgery, optimizer: Optimizer, group: dict[str, Any], own: set[int]) -> None:
    """Remove from a group's lists, in place, the parameters that are not the model's."""
    parameters = group["params"]
    before = {key: list(group[key]) for key in ("params", "param_names") if key in group}
    stays = [id(parameter) in own for parameter in parameters]

    def restore() -> None:
        for now in optimizer.param_groups:  # load_state_dict makes new groups of the same lists
            if now["params"] is parameters:
                for key, items in before.items():
                    known = set(map(_identity, items))
                    now[key][:] = items + [x for x in now[key] if _identity(x) not in known]

    surgery.note(restore)
    for key, items in before.items():
        group[key][:] = [item for item, stay in zip(items, stays, strict=True) if stay]


def _identity(item: Tensor | str) -> int | str:
    return item if isinstance(item, str) else id(item)


def _forget(surgery: Surgery, optimizer: Optimizer, gone: Iterable[Tensor]) -> None:
    """Remove the state of parameters; what has become of the others since survives the undo."""
    order = list(optimizer.state)
    removed = {p: optimizer.state[p] for p in gone if p in optimizer.state}

    now = dict(removed)

    def restore() -> None:
        state = optimizer.state  # load_state_dict makes a new one
        now.update(state)  # kept outside, so that an interruption after clear() can be repeated
        ordered = {p: now[p] for p in order if p in now}
        state.clear()
        state.update({**ordered, **now})

    surgery.note(restore)
    for parameter in removed:
        del optimizer.state[parameter]


def drop_stale_gradients(model: nn.Module, layers: Layers = None) -> GradientReport:
    """Drop the gradients of norm layers' weights and biases that do not require any.

    A parameter that is frozen after a backward keeps the gradient it has, and
    ``zero_grad(set_to_none=False)`` keeps a gradient of zeros: optimizers go on moving what has a
    gradient, by momentum, weight decay and moments. One without stands still.

    Args:
        model: The model.
        layers: Which norm layers; see `select`.

    Returns:
        The parameters that had one; `undo()`.

    Raises:
        SelectorError: `layers` matches nothing.

    Mutates:
        `.grad` of those parameters: all of them or, if anything is raised, none.

    Cost:
        One look at each layer.

    Example:
        >>> import torch
        >>> bn = nn.BatchNorm1d(8)
        >>> optimizer = torch.optim.SGD(bn.parameters(), lr=0.1, weight_decay=0.1)
        >>> bn(torch.randn(4, 8)).sum().backward()
        >>> _ = bn.requires_grad_(False)
        >>> drop_stale_gradients(bn).dropped
        ('weight', 'bias')
        >>> optimizer.step()
        >>> bn.weight.min().item()
        1.0
    """
    stale: dict[int, tuple[str, Tensor]] = {}
    for layer in select(model, layers):
        for name in AFFINE:
            tensor = layer.tensors().get(name)
            if not isinstance(tensor, nn.Parameter) or tensor.requires_grad:
                continue
            if tensor.grad is not None:
                stale.setdefault(id(tensor), (dotted(layer.path, name), tensor))
    report = GradientReport(tuple(name for name, _ in stale.values()), Surgery())
    with report._surgery as surgery:
        for _, parameter in stale.values():
            surgery.note(partial(setattr, parameter, "grad", parameter.grad))
            parameter.grad = None
        return report
