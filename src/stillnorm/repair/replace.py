"""Replacing norm layers by layers of another kind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn
from torch.nn.utils import parametrize

from stillnorm.errors import RepairError
from stillnorm.holding import hold, part_unheld, remember
from stillnorm.norms import Layers, NormLayer, hold_of, select
from stillnorm.norms.adapters.keras import FOREIGN
from stillnorm.repair.affine import must_agree
from stillnorm.repair.calls import Place, places_of
from stillnorm.repair.kinds import HOOKS, KINDS, STATE_HOOKS, Kind, Made
from stillnorm.repair.report import Replaced, ReplaceReport
from stillnorm.repair.surgery import Surgery, refuse_wrapped

Replacement = str | Callable[[nn.Module], nn.Module | None]


def replace(model: nn.Module, kind: Replacement, layers: Layers = None) -> ReplaceReport:
    """Replace norm layers by layers of another kind, keeping what can be kept.

    Parameters and buffers that the new layer has too are the same objects, so that optimizers and
    DataParallel go on; hooks, mode, dtype, device and eps are those of the old one. A layer with
    several names becomes one new layer under all of them. The report says what is lost.

    - ``"group"``: GroupNorm, with the largest of 32, 16, 8, 4 or 2 groups that divides the channels
      and leaves at least 2 in each (8 for BatchNorm1d), else 1. The weights stay; it computes
      another function, which has to be trained.
    - ``"layer"``: GroupNorm with one group, over all of a sample. On (N, C) that is
      `nn.LayerNorm(C)`, on maps `nn.LayerNorm((C, H, W))` with weights per channel; it needs no
      size and no BatchNorm tells whether its input has one. ConvNeXt's, over the channels of each
      position, is another: give a callable.
    - ``"affine"``: `AffineNorm`, a scale and a shift: the eval function in both modes. They learn
      where weight and bias did, as new parameters that no optimizer knows yet.
    - ``"sync"``: SyncBatchNorm; over all ranks unless you set `process_group`, and between ranks it
      trains on GPUs only.
    - ``"batch"``: SyncBatchNorm back to the class that it had. One that was not made here does not
      know its dimension: say ``"batch1d"``, ``"batch2d"`` or ``"batch3d"``. And the frozen layers
      of torchvision, timm, detectron2, transformers and their copies to BatchNorm2d held by
      stillnorm, with the eps that they really use; on half precision it returns the input's
      dtype, where theirs return that of their buffers.
    - ``"frozen"``: torchvision's FrozenBatchNorm2d, for code that expects it, with copies of the
      tensors; ``"batch"`` leads back, with the same parameters if nothing was loaded meanwhile.

    timm's layers with an activation become the kind with an activation, with the same activation.
    Classes with other methods of their own are refused, and so are layers that the model also keeps
    in a plain list or attribute. A list outside the model's modules cannot be seen: it keeps
    calling the old layer.

    Args:
        model: The model, in whatever mode.
        kind: One of the names above; or what makes the new module of the old one, or returns None
            to leave it. It must not change the old one.
        layers: Which layers; see `select`. None for all.

    Returns:
        Which layers were replaced, by what, and what is lost; which were of the kind already; which
        were refused, and why; `undo()`.

    Raises:
        StateError: The model is wrapped by DistributedDataParallel or `fully_shard`, which know its
            tensors; or a new layer does not compute what the old one does in eval mode.
        RepairError: There is no such kind, or the callable returned the layer itself, or something
            else than a module.
        SelectorError: `layers` matches nothing.

    Mutates:
        The modules in the places of the layers: all or, if anything is raised, none.

    Cost:
        For the kinds that keep the eval function, one small forward of each layer, old and new.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64))
        >>> report = replace(net, "group")
        >>> net[1].num_groups, net[1].num_channels
        (32, 64)
        >>> report.replaced[0].lost
        'what it computes in eval mode, running statistics, momentum, num_batches_tracked'
        >>> report.undo()
        >>> net[1].num_features
        64
    """
    refuse_wrapped(model)
    made_as = _kind(model, kind)
    chosen = select(model, layers)
    with Surgery() as surgery:
        plans, refused = _plan(model, chosen, made_as, kind)
        for plan in plans:
            if made_as.same_eval:
                must_agree(plan.layer, plan.new)
        for plan in plans:
            plan.commit(surgery)
        _part_unheld(model, surgery)
        already = tuple(layer.path for layer in chosen if made_as.already(layer))
        replaced = tuple(plan.reported(made_as) for plan in plans)
        return ReplaceReport(replaced, already, refused, surgery)


@dataclass(frozen=True, eq=False)
class _Plan:
    """A layer, its places, and what is to stand there."""

    layer: NormLayer
    places: tuple[Place, ...]
    new: nn.Module

    def commit(self, surgery: Surgery) -> None:
        """Put the new module at every place; what took over a foreign frozen layer is held."""
        for place in self.places:
            surgery.set_child(place.parent, place.name, self.new)
        was_frozen = self.layer.family == "frozen"
        if was_frozen and isinstance(self.new, nn.BatchNorm2d) and hold_of(self.new) is None:
            surgery.note(remember(self.new))  # its parameters may be those from before
            hold(self.new, "frozen")

    def reported(self, kind: Kind) -> Replaced:
        """Return it as the report has it."""
        before, after = (type(module).__name__ for module in (self.layer.module, self.new))
        lost = ", ".join(_lost(self.layer, self.new, kind))
        return Replaced(self.layer.path, self.layer.paths, before, after, lost)


def _kind(model: nn.Module, kind: Replacement) -> Kind:
    if callable(kind):
        return Kind(partial(_made_by, kind, set(model.modules())), same_eval=False)
    if kind not in KINDS:
        raise RepairError(
            f"there is no kind {kind!r}",
            help=f"one of {', '.join(KINDS)}; or a function (norm) -> module",
        )
    return KINDS[kind]


def _made_by(
    make: Callable[[nn.Module], nn.Module | None], there: Collection[nn.Module], layer: NormLayer
) -> Made:
    """Call the user's callable; what is new in what it returns gets the mode of the layer."""
    old = layer.module
    new = make(old)
    if new is None:
        return "the callable returned None for it"
    if not isinstance(new, nn.Module):
        raise RepairError(
            f"{layer.path}: the function returned a {type(new).__name__}, not a module",
            help="return the new module, or None to leave the layer",
        )
    if new is old:
        raise RepairError(
            f"{layer.path}: the function returned the layer itself",
            help="return a new module, or None to leave the layer",
        )
    for module in new.modules():
        if module not in there and hold_of(module) is None:
            module.training = old.training if layer.hold is None else layer.hold.asked
    return new


def _plan(
    model: nn.Module, chosen: Sequence[NormLayer], made_as: Kind, kind: Replacement
) -> tuple[list[_Plan], tuple[tuple[str, str], ...]]:
    """Make the new modules; nothing of the model is touched."""
    plans: list[_Plan] = []
    refused: list[tuple[str, str]] = []
    kept = _kept_elsewhere(model, chosen)
    for layer in chosen:
        if made_as.already(layer):
            continue
        if layer.family == "keras":
            refused.append((layer.path, FOREIGN))
            continue
        places = places_of(model, layer)
        reason = kept.get(layer.module) or _why_not(layer, places, kind)
        made = reason or made_as.make(layer)
        if isinstance(made, str):
            refused.append((layer.path, made))
        else:
            plans.append(_Plan(layer, places, made))
    return plans, tuple(refused)


def _why_not(layer: NormLayer, places: Sequence[Place], kind: Replacement) -> str:
    """Say why the layer cannot be replaced by any kind; "" if it can."""
    module = layer.module
    if not places:
        name = repr(kind) if isinstance(kind, str) else "kind"
        return (
            "is the model itself, which nothing holds a place for: "
            f"net = nn.Sequential(model); sn.replace(net, {name}); model = net[0]"
        )
    if layer.is_scripted:
        return "is TorchScript's: replace before scripting"
    if layer.is_lazy:
        return "is lazy: it has no channels before its first forward"
    if parametrize.is_parametrized(module):
        return "is parametrized: remove the parametrizations first"
    if layer.family != "frozen" and any(
        tensor is not None and not isinstance(tensor, nn.Parameter)
        for tensor in (layer.weight, layer.bias)
    ):
        return "its weight or bias is computed from other parameters (pruning, weight_norm)"
    if callable(kind):
        return ""
    if layer.family == "instance":
        return "is an instance norm, of which only a callable can make something else"
    methods = (name for name in ("forward", "train", "eval") if name in vars(module))
    if (method := next(methods, None)) is not None:
        return f"its {method}() was replaced on the instance, past its class"
    return ""


def _kept_elsewhere(model: nn.Module, chosen: Sequence[NormLayer]) -> dict[nn.Module, str]:
    """Return, for layers that a module also has in a plain attribute or list, who does."""
    modules = {layer.module for layer in chosen}
    found: dict[nn.Module, str] = {}
    for owner in model.modules():
        for name, value in vars(owner).items():
            if name != "_modules":
                where = f"{type(owner).__name__}.{name}"
                reason = f"is also in {where}, past its registration, and would be called there"
                found |= {m: reason for m in _modules_in(value) if m in modules}
    return found


def _modules_in(value: object, depth: int = 4) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif depth and isinstance(value, dict | list | tuple | set):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(item, depth - 1)


def _lost(layer: NormLayer, new: nn.Module, kind: Kind) -> Iterator[str]:
    """Say what the old module had and the new one has not."""
    old = layer.module
    if old in set(new.modules()):
        return
    if kind in KINDS.values() and not kind.same_eval:
        yield "what it computes in eval mode"
    elif kind.same_eval and not kind.same_train and layer.normalizes_by(training=True) == "batch":
        yield "batch statistics in train mode"
    kept = {id(parameter) for parameter in new.parameters()}
    gone = [name for name, p in old.named_parameters(recurse=False) if id(p) not in kept]
    if gone:
        yield f"{' and '.join(gone)} as parameters"
    names = {"running_mean": "running statistics"} | {
        name: name for name in ("momentum", "num_batches_tracked", "process_group")
    }
    for name, words in names.items():
        if getattr(old, name, None) is not None and not hasattr(new, name):
            yield words
    if layer.hold is not None and hold_of(new) is None and not kind.same_eval:
        yield "the hold"
    if any(old.__dict__[name] and not new.__dict__[name] for name in (*HOOKS, *STATE_HOOKS)):
        yield "hooks"


def _part_unheld(model: nn.Module, surgery: Surgery) -> None:
    """Make convolutions plain whose held norm is gone."""
    parted: list[Callable[[], None]] = []
    surgery.note(lambda: [put_back() for put_back in reversed(parted)])
    part_unheld(model, parted)
