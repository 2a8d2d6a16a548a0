"""Splitting shared norms: one for each call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from stillnorm.calibration import recalibrate
from stillnorm.errors import CalibrationError, StateError
from stillnorm.norms import Layers, NormLayer, probe_modes, select
from stillnorm.norms.adapters.keras import FOREIGN
from stillnorm.repair.calls import CallCounter, Calls, Place, places_of
from stillnorm.repair.per_call import Finish, Restart, SplitNorm, twin
from stillnorm.repair.report import Split, SplitReport
from stillnorm.repair.surgery import Surgery, refuse_wrapped
from stillnorm.state import preserved
from stillnorm.tracing import Forward, copied, each_batch, running, tensors_in

Affine = Literal["shared", "private"]


def split_shared(
    model: nn.Module,
    batches: object,
    layers: Layers = None,
    *,
    affine: Affine = "shared",
    forward: Forward | None = None,
) -> SplitReport:
    """Give every call of a shared norm layer a norm with statistics of its own.

    For a layer that is called at several places, or several times in a loop, in one forward: in
    train mode each call is normalised by its own batch, and eval has one set of statistics for all
    of them, which fits none. Afterwards each call has its own, estimated from the batches; the
    weights are untouched and train mode computes what it did, bit for bit.

    A layer registered at several places becomes one norm at each. Repeated calls of one
    registration are told apart by their order, counted from where the forward of the smallest
    module begins that encloses all of them: `SplitNorm`. That survives forwards that are aborted,
    deepcopy, pickle, compilation, DistributedDataParallel and checkpointing of that whole module;
    more calls than there were, calls from elsewhere, two threads at once, and computing a part of
    that forward again raise. A checkpoint from before loads as it is: each call starts with the
    statistics of the shared layer; the way back is `sn.repair.shared_state_dict`.

    Args:
        model: The model, in whatever mode.
        batches: As `recalibrate` takes them, of training data. The first one tells the calls.
        layers: Which layers; see `select`. Default: all that are called more than once.
        affine: "shared": all calls share weight and bias, the same parameters as before. "private":
            each but the first gets its own, which an optimizer does not know yet.
        forward: ``(model, batch) -> output``, where the model cannot be called on a batch itself.

    Returns:
        Which layers were split, into what; which were not, and why; `undo()`.

    Raises:
        StateError: The model is wrapped by DistributedDataParallel or `fully_shard`, which know its
            tensors; or it computes something else with its norms split.
        CalibrationError: The batches give no statistics.
        BatchError: A batch does not fit the model, or the forward raised.
        SelectorError: `layers` matches nothing.

    Mutates:
        The modules in the place of the layers, and two hooks on the modules that enclose their
        calls: all of them or, if anything is raised, none.

    Cost:
        Three forwards of the first batch, and `recalibrate` of the new norms.

    Example:
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bn = nn.BatchNorm1d(8)
        ...     def forward(self, x):
        ...         return self.bn(5 + 3 * self.bn(x).relu())
        >>> net = Net()
        >>> split_shared(net, torch.randn(64, 8)).split[0].calls
        2
        >>> net.bn.sites[1].running_mean.min() > 5
        tensor(True)
    """
    refuse_wrapped(model)
    data = each_batch(batches)
    first = next(data, None)
    if first is None:
        raise CalibrationError(
            "there is no batch in batches=",
            help="an iterator can be read only once: give the DataLoader or the list itself",
        )
    chosen = select(model, layers)
    counted, before = _run(model, first, forward, [layer.module for layer in chosen])
    with Surgery() as surgery:
        plans, refused = _plan(model, chosen, counted)
        if layers is not None:
            refused += [(layer.path, reason) for layer, reason in _single(chosen, counted)]
        edits = [_Edit.make(surgery, plan, affine) for plan in plans]
        counted, _ = _run(model, first, forward, [m for edit in edits for m in edit.watched])
        reasons = {edit: edit.split(counted, affine) for edit in edits}
        refused += [(edit.plan.layer.path, reason) for edit, reason in reasons.items() if reason]
        kept = [edit for edit, reason in reasons.items() if not reason]
        statistics = None
        if kept:
            _must_agree(before, _run(model, first, forward, ())[1])
            new = [norm for edit in kept for norm in edit.norms]
            again = chain((first,), data)
            statistics = recalibrate(model, again, new, forward=forward, group="self")
        return SplitReport(
            tuple(edit.reported() for edit in kept), tuple(refused), statistics, surgery
        )


@dataclass(frozen=True, eq=False)
class _Plan:
    """A layer to be split, at the places where it is registered."""

    layer: NormLayer
    places: tuple[Place, ...]
    calls: int


@dataclass(eq=False)
class _Edit:
    """A layer being split: at each of its places now stands a twin of its own."""

    plan: _Plan
    surgery: Surgery
    twins: list[nn.Module]
    norms: list[nn.Module] = field(default_factory=list)

    @property
    def watched(self) -> list[nn.Module]:
        """The modules whose calls decide: the twins, and the layer, which nobody should call."""
        return [*self.twins, self.plan.layer.module]

    @classmethod
    def make(cls, surgery: Surgery, plan: _Plan, affine: Affine) -> _Edit:
        """Put a twin at every place of the layer."""
        part = surgery.part()
        made = cls(plan, part, [])
        for i, place in enumerate(plan.places):
            copied = twin(plan.layer.module, shared=affine == "shared" or i == 0)
            part.set_child(place.parent, place.name, copied)
            made.twins.append(copied)
        return made

    def split(self, counted: dict[nn.Module, Calls], affine: Affine) -> str:
        """Split what is still called several times; say why not, and undo, where it cannot be."""
        reason = self._split(counted, affine)
        if reason:
            self.surgery.undo()
        return reason

    def _split(self, counted: dict[nn.Module, Calls], affine: Affine) -> str:
        if self.plan.layer.module in counted:
            return (
                "is called past its registration (a plain list, an attribute of something else): "
                "register it, as in nn.ModuleList"
            )
        for place, module in zip(self.plan.places, self.twins, strict=True):
            calls = counted.get(module)
            if calls is None or calls.count == 1:
                self.norms.append(module)
                continue
            if calls.owner is None:
                return "is called in several forwards of the model, which nothing encloses"
            if calls.is_recursive:
                return "is called by a module that calls itself"
            norm = SplitNorm(module, place.path, calls.count, shared=affine == "shared")
            self.surgery.set_child(place.parent, place.name, norm)
            self.surgery.add_pre_hook(calls.owner, Restart(norm))
            self.surgery.add_hook(calls.owner, Finish(norm))
            self.norms += norm.sites
        return ""

    def reported(self) -> Split:
        """Return it as the report has it."""
        layer = self.plan.layer
        return Split(layer.path, layer.paths, self.plan.calls, len(self.norms))


def _plan(
    model: nn.Module, chosen: Sequence[NormLayer], counted: dict[nn.Module, Calls]
) -> tuple[list[_Plan], list[tuple[str, str]]]:
    """Return what to split, and what is called several times and cannot be, with the reason."""
    modes = probe_modes(model)
    plans: list[_Plan] = []
    refused: list[tuple[str, str]] = []
    for layer in chosen:
        calls = counted.get(layer.module)
        if calls is None or calls.count < 2:
            continue
        if layer.family == "keras":
            refused.append((layer.path, FOREIGN))
        elif modes.held_by(layer) is not None:
            refused.append((layer.path, "is held: it has one set of statistics in both modes"))
        elif not layer.has_statistics:
            refused.append((layer.path, "has no running statistics: every call has its own"))
        elif layer.is_scripted:
            refused.append((layer.path, "is TorchScript's: split before scripting"))
        elif not (places := places_of(model, layer)):
            refused.append((layer.path, "is the model itself: nothing encloses its calls"))
        else:
            plans.append(_Plan(layer, places, calls.count))
    return plans, refused


def _single(
    chosen: Sequence[NormLayer], counted: dict[nn.Module, Calls]
) -> Iterator[tuple[NormLayer, str]]:
    """Yield layers that were named and are called no more than once, with the reason."""
    for layer in chosen:
        calls = counted.get(layer.module)
        if calls is None or calls.count < 2:
            yield layer, "is not called" if calls is None else "is called once in a forward"


def _run(
    model: nn.Module, batch: object, forward: Forward | None, modules: Sequence[nn.Module]
) -> tuple[dict[nn.Module, Calls], list[Tensor]]:
    """Run one batch as in training; return the calls of the modules, and the outputs."""
    counter = CallCounter(modules)
    with contextlib.ExitStack() as kept:
        for module in modules:  # some may be called though the model does not contain them
            kept.enter_context(preserved(module))
        run = kept.enter_context(running(model, forward=forward, flow="batch"))
        kept.enter_context(counter.counting())
        output, _ = run(copied(batch))
    return counter.calls, list(tensors_in(output))


def _must_agree(before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """Raise when the model computes something else in train mode than before."""
    same = len(before) == len(after) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(before, after, strict=True)
    )
    if not same:
        raise StateError(
            "with one norm per call the model computes something else in train mode",
            help="it compares or changes its norm layers as objects; nothing was changed",
        )
