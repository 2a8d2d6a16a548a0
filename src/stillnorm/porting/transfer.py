"""What porting is in either direction: match, port each layer, compare, or take all of it back."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from stillnorm.errors import PortError, RefusedError, StateError
from stillnorm.norms import same_bits
from stillnorm.porting.part import Refusal
from stillnorm.porting.report import Agreement, Ported, PortReport, Setting
from stillnorm.porting.torch_layers import TorchPart
from stillnorm.porting.torch_layers import parts_of as torch_parts
from stillnorm.repair.surgery import Surgery, refuse_wrapped
from stillnorm.reports.numbers import count as plural

if TYPE_CHECKING:
    from stillnorm.porting.matching import Matching, Names, Pair

Which = Literal["all", "norms"]
Count = int | Mapping[str, int] | None

_ORDER = "from_keras(keras_model, torch_model), to_keras(torch_model, keras_model)"
_ORDERED = "layers of one shape, matched by order, may have changed places: give names=; or else "
_OTHERWISE = (
    "the networks differ in what has no weights: padding, an activation, an order; "
    "docs/porting.md has what it mostly is"
)


@dataclass(frozen=True)
class Direction:
    """One way to port.

    Args:
        to: The framework of the model that is changed.
        port: Ports one layer under surgery; yields notes, or raises a Refusal.
        correct: Gives the variance of one norm, of batches of n values, the other convention.
    """

    to: Literal["torch", "keras"]
    port: Callable[[Pair, Surgery], Iterator[str]]
    correct: Callable[[Pair, int, Surgery], None]


@dataclass(frozen=True)
class Check:
    """On what two models are to be compared; see `from_keras`."""

    example: object
    torch_example: object
    tolerance: float | None

    def __post_init__(self) -> None:
        given = self.tolerance
        if not (given is None or (isinstance(given, Real) and given >= 0)):
            raise ValueError(f"tolerance={self.tolerance!r} is no number of 0 or more")

    def run(self, keras_model: Any, model: nn.Module, pairs: Sequence[Pair]) -> Agreement:
        """Compare the models; both are left as found."""
        from stillnorm.porting.agreement import agreement

        return agreement(
            keras_model, model, pairs, self.example, self.torch_example, self.tolerance
        )


def transfer(
    keras_model: Any,
    model: nn.Module,
    direction: Direction,
    names: Names,
    which: Which,
    count: Count,
    check: Check,
    strict: bool,
) -> PortReport:
    """Port every layer, all or nothing; see `from_keras` for the arguments."""
    matching, refused, alone = matched(keras_model, model, names, which)
    refuse_wrapped(model)
    counts = _counts(count, matching.pairs)
    done: dict[Pair, Ported] = {}
    with Surgery() as surgery:
        for pair in matching.pairs:
            one, twin = pair
            part = surgery.part()
            before = _settings(twin)
            kind = type(twin.module).__name__ if twin.norm is None else twin.norm.kind
            try:
                notes = tuple(direction.port(pair, part))
            except Refusal as reason:
                part.undo()
                refused.append((twin.path if direction.to == "torch" else one.name, str(reason)))
            else:
                changed = _changed(before, _settings(twin)) if direction.to == "torch" else ()
                done[pair] = Ported(one.name, twin.path, one.geometry.kind, notes, kind, changed)
        if strict and refused:
            raise _refused(refused)
        _must_hold(done, direction.to)
        agreed = None
        if check.example is not None:
            agreed = check.run(keras_model, model, matching.pairs)
            if not agreed:
                raise _differ(agreed, matching, alone + len(matching.pairs) - len(done), which)
        # Only now: with the value as it was the outputs are the same.
        for pair in done:
            if (n := counts.get(pair[1].path)) is not None:
                direction.correct(pair, n, surgery)
        return PortReport(
            direction.to,
            tuple(done.values()),
            tuple(refused),
            matching.by,
            matching.left_in_keras,
            matching.left_in_torch,
            matching.by_chance,
            _variance(direction, len(counts)),
            agreed,
            direction.to == "keras" and bool(getattr(keras_model, "compiled", False)),
            surgery,
        )


def matched(
    keras_model: Any, model: nn.Module, names: Names, which: Which
) -> tuple[Matching, list[tuple[str, str]], int]:
    """Match the layers of both models.

    Returns:
        The pairs; what has weights besides, and why it stays; how many layers of the torch model
        are in no pair.

    Raises:
        PortError: They cannot be matched.
    """
    if which not in ("all", "norms"):
        raise ValueError(f"which={which!r} is not 'all' or 'norms'")
    # By name: Keras is imported where it is in use already, and nowhere else.
    if not any(kind.__module__.startswith("keras.src.") for kind in type(keras_model).__mro__):
        raise PortError(f"a {type(keras_model).__name__} is no model of Keras 3", help=_ORDER)
    from stillnorm.porting.keras import parts as keras_parts
    from stillnorm.porting.matching import match

    if not isinstance(model, nn.Module) or keras_parts.is_keras_model(model):
        raise PortError(f"a {type(model).__name__} is no model of torch's own", help=_ORDER)
    if not keras_parts.is_keras_model(keras_model):
        raise PortError(f"a {type(keras_model).__name__} is no Keras model", help=_ORDER)
    if not keras_model.built:
        raise PortError(
            f"{keras_model.name} is not built: it has no weights yet",
            help="call it once on an example, or give it an Input",
        )
    theirs, their_others = keras_parts.parts_of(keras_model)
    ours, our_others = torch_parts(model)
    many = len(ours) + len(our_others)
    if which == "norms":
        theirs = [part for part in theirs if part.geometry.kind == "batch norm"]
        ours = [part for part in ours if part.norm is not None]
    try:
        matching = match(theirs, ours, names)
    except PortError as error:
        if not (others := their_others + our_others):
            raise
        name, reason = others[0]
        left = f"; left out is {name or '(root)'}: {reason}"
        raise PortError(error.fact, help=error.help + left) from None
    some = which == "norms" or isinstance(names, Mapping)
    refused = [] if some else their_others + our_others
    return matching, refused, many - len(matching.pairs)


def _counts(count: Count, pairs: Sequence[Pair]) -> dict[str, int]:
    """Return n by torch path."""
    paths = [twin.path for _, twin in pairs if twin.norm is not None]
    if count is None:
        return {}
    counts = dict(count) if isinstance(count, Mapping) else dict.fromkeys(paths, count)
    help = "batch size times height times width"
    for path, n in counts.items():
        if path not in paths:
            raise PortError(f"count=: {path!r} is no batch norm", help=f"it has {', '.join(paths)}")
        try:
            counts[path] = operator.index(n)
        except TypeError:
            raise PortError(f"count={n!r} is no whole number of values", help=help) from None
        if counts[path] < 2:
            raise PortError(
                f"count={n}: of less than 2 values there is no unbiased variance", help=help
            )
    return counts


def _must_hold(pairs: Collection[Pair], to: str) -> None:
    """Raise where a layer has no longer what it was given, for another one has the same memory."""
    for pair in pairs:
        one, twin = pair
        for name, tensor in twin.tensors().items():
            there, here = one.read(name), tensor.detach().cpu().contiguous()
            if there is None:
                continue
            given, has = (there, here) if to == "torch" else (here, there)
            if not same_bits(given.to(has.dtype), has):
                tied = [_named(q, to) for q in pairs if _memory(q, to) & _memory(pair, to)]
                here_alone = "torch, and not in Keras" if to == "torch" else "Keras, not in torch"
                raise StateError(
                    f"{' and '.join(tied)} share their {name} in {here_alone}",
                    help="untie them, or tie the layers on the other side",
                )


def _named(pair: Pair, to: str) -> str:
    return pair[1].path if to == "torch" else pair[0].name


def _memory(pair: Pair, to: str) -> set[int]:
    """Return what tells the memory of a layer's tensors, or its variables."""
    if to == "keras":
        return {id(stored.variable) for stored in pair[0].stored.values()}
    return {tensor.untyped_storage().data_ptr() for tensor in pair[1].tensors().values()}


def _refused(refused: list[tuple[str, str]]) -> RefusedError:
    name, reason = refused[0]
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    return RefusedError(
        f"{name or '(root)'} cannot be ported: {reason}{more}",
        help="nothing was changed; strict=False ports the others",
    )


def _differ(agreed: Agreement, matching: Matching, alone: int, which: Which) -> PortError:
    """Say what differs, and what it may come from: the likeliest first."""
    if agreed.same_outputs and agreed.same_statistics:
        help = "set it alike in both models; without example= nothing is compared"
    elif alone:
        why = "which='norms'" if which == "norms" else "names="
        why = why if which == "norms" or matching.by == "map" else "they cannot be"
        help = (
            f"{plural(alone, 'torch layer')} with weights not ported ({why}), without which no "
            "example agrees: give it once all are"
        )
    else:
        help = _ORDERED * matching.by_chance + _OTHERWISE
    return PortError(f"the models differ, and nothing was changed: {agreed.told()}", help=help)


def _settings(twin: TorchPart) -> dict[str, float | bool | None]:
    """Return what a norm is set to that is no tensor."""
    norm = twin.norm
    if norm is None:
        return {}
    settings: dict[str, float | bool | None] = {
        "eps": norm.eps,
        "momentum": norm.momentum,
        "held": norm.hold is not None,
    }
    if norm.hold is None:  # a hold decides what learns
        learn = {name: twin.tensors().get(name) for name in ("weight", "bias")}
        settings |= {
            f"{k}.requires_grad": t.requires_grad for k, t in learn.items() if t is not None
        }
    return settings


def _changed(
    before: dict[str, float | bool | None], after: dict[str, float | bool | None]
) -> tuple[Setting, ...]:
    return tuple(
        Setting(name, before[name], value)
        for name, value in after.items()
        if name in before and value != before[name]
    )


def _variance(direction: Direction, counts: int) -> str:
    if not counts:
        return (
            "variance: kept as it is, so that eval outputs stay the same; Keras keeps the biased "
            "one, torch n / (n - 1) times it: count= converts"
        )
    factor = "n / (n - 1)" if direction.to == "torch" else "(n - 1) / n"
    return f"variance: times {factor}, of {plural(counts, 'norm')} whose count was given"
