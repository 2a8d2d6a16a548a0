"""Which layer of a Keras model is which of a torch model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from stillnorm.errors import PortError
from stillnorm.porting.keras.parts import KerasPart
from stillnorm.porting.torch_layers import TorchPart
from stillnorm.reports.numbers import count

Names = Mapping[str, str] | Callable[[str], str] | None
Pair = tuple[KerasPart, TorchPart]


@dataclass(frozen=True, eq=False)
class Matching:
    """Pairs of layers.

    Args:
        pairs: They, in the Keras model's order.
        by: How they were found: by the map that was given, by the names being the same, or by
            order.
        left_in_keras: Names of the layers that the map does not mention.
        left_in_torch: Paths of those.
    """

    pairs: tuple[Pair, ...]
    by: Literal["map", "names", "order"]
    left_in_keras: tuple[str, ...] = ()
    left_in_torch: tuple[str, ...] = ()

    @property
    def by_chance(self) -> bool:
        """Whether two layers could be in each other's place: matched by order, and all the same."""
        kinds = {one.geometry for one, _ in self.pairs}
        return self.by == "order" and len(kinds) < len(self.pairs)


def match(keras: Sequence[KerasPart], torch: Sequence[TorchPart], names: Names) -> Matching:
    """Match the layers of two models.

    Args:
        keras: Those of the Keras model.
        torch: Those of the torch model.
        names: A path for each name; None for the same names, or else the same order.

    Raises:
        PortError: There is no one-to-one match, or two layers are not the same.
    """
    if names is not None:
        found = _by_map(keras, torch, names)
    else:
        found = _by_names(keras, torch) or _by_order(keras, torch)
    for one, other in found.pairs:
        if one.geometry != other.geometry:
            raise PortError(
                f"{one.name} is a {one.geometry} in Keras and {other.path or '(root)'}, with which "
                f"it was matched by {_BY[found.by]}, a {other.geometry} in torch",
                help=_HELP[found.by],
            )
    return found


_BY = {"map": "names=", "names": "its name", "order": "order"}
_MAP = "give a map of Keras names to torch paths: names={'conv1': 'stem.conv', ...}"
_HELP = {
    "map": "correct names=, or the torch model",
    "names": "correct the torch model, or match otherwise with names={'conv1': 'stem.conv', ...}",
    "order": _MAP,
}


def _by_map(keras: Sequence[KerasPart], torch: Sequence[TorchPart], names: Names) -> Matching:
    if not (callable(names) or isinstance(names, Mapping)):
        raise PortError(f"names= is a {type(names).__name__}, no map and no function", help=_MAP)
    parts = {part.name: part for part in keras}
    paths = {part.path: part for part in torch}
    named = {name: names(name) for name in parts} if callable(names) else dict(names)
    for given, known, what in (
        (named.keys(), parts, "layer of the Keras model"),
        (named.values(), paths, "layer of the torch model"),
    ):
        for name in given:
            if not isinstance(name, str) or name not in known:
                near = get_close_matches(str(name), known, n=3, cutoff=0.4) or list(known)[:3]
                raise PortError(
                    f"names=: {name!r} is no {what} that has weights to port",
                    help=f"nearest: {', '.join(near)}",
                )
    for name in named:
        if sum(part.name == name for part in keras) > 1:
            raise PortError(
                f"names=: several layers of the Keras model are called {name!r}",
                help="name them apart where they are made: layers.Dense(10, name='head')",
            )
    if len(set(named.values())) < len(named):
        twice = next(path for path in named.values() if list(named.values()).count(path) > 1)
        raise PortError(
            f"names= gives {twice!r} to several layers", help="every torch layer has one twin"
        )
    used = set(named.values())
    left_in_keras = tuple(name for name in parts if name not in named)
    left_in_torch = tuple(path for path in paths if path not in used)
    pairs = tuple((part, paths[named[name]]) for name, part in parts.items() if name in named)
    return Matching(pairs, "map", left_in_keras, left_in_torch)


def _by_names(keras: Sequence[KerasPart], torch: Sequence[TorchPart]) -> Matching | None:
    """Match layers whose names are the same but for what separates their components."""
    paths = {_plain(part.path): part for part in torch}
    names = {_plain(part.name): part for part in keras}
    one_to_one = len(paths) == len(torch) == len(keras) == len(names)
    if not one_to_one or paths.keys() != names.keys():
        return None
    return Matching(tuple((part, paths[name]) for name, part in names.items()), "names")


def _plain(name: str) -> str:
    return re.sub(r"[./]", "_", name)


def _by_order(keras: Sequence[KerasPart], torch: Sequence[TorchPart]) -> Matching:
    """Match the n-th layer of each kind: branches may come in another order than norms in them."""
    twins: dict[str, list[TorchPart]] = defaultdict(list)
    for part in torch:
        twins[part.geometry.kind].append(part)
    mine: dict[str, list[KerasPart]] = defaultdict(list)
    for one in keras:
        mine[one.geometry.kind].append(one)
    for kind in {**mine, **twins}:
        if len(mine[kind]) != len(twins[kind]):
            raise PortError(
                f"the Keras model has {count(len(mine[kind]), kind)}, the torch model "
                f"{len(twins[kind])}",
                help=f"{_unmatched(mine[kind], twins[kind])}; {_MAP}; only what it names is ported",
            )
    rest = {kind: iter(parts) for kind, parts in twins.items()}
    return Matching(tuple((one, next(rest[one.geometry.kind])) for one in keras), "order")


def _unmatched(keras: Sequence[KerasPart], torch: Sequence[TorchPart]) -> str:
    """Name the layers of a kind whose names are on one side only."""
    names, paths = {_plain(part.name) for part in keras}, {_plain(part.path) for part in torch}
    sides = {
        "Keras": [part.name for part in keras if _plain(part.name) not in paths],
        "torch": [part.path or "(root)" for part in torch if _plain(part.path) not in names],
    }
    return "; ".join(
        f"only in {side}: {shortened(alone)}" for side, alone in sides.items() if alone
    )


def shortened(names: Sequence[str]) -> str:
    """Write a list of names, of a long one the first few."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


_SHOWN = 4
