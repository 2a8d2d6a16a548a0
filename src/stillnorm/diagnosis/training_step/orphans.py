"""Parameters of an optimizer that were the model's: told by names, or by the place in the order.

An optimizer keeps parameters in the order that it was given. Between two that are the model's stand
those that stood there when it was made; what the model has there now, and no group holds, has
replaced them. That another module's parameters are meant to be there cannot be excluded for any
that stand at the end, or fit nothing: of those nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from stillnorm.norms import clean_path


@dataclass(frozen=True, eq=False)
class Orphan:
    """A parameter that the optimizer holds and the model had.

    Args:
        parameter: The parameter.
        place: The module that stands in its place, or before it where nothing does.
        heir: The name of the model's parameter in its place, which no group holds; or None.
    """

    parameter: Tensor
    place: str
    heir: str | None


@dataclass(frozen=True, eq=False)
class Strangers:
    """An optimizer's parameters that are not the model's.

    Args:
        orphans: Those that were.
        unknown: The number of the others.
        own: The number of parameters that are the model's.
    """

    orphans: tuple[Orphan, ...]
    unknown: int
    own: int


def find_strangers(model: nn.Module, optimizer: Optimizer) -> Strangers:
    """Find an optimizer's parameters that are not the model's, and tell which of them were."""
    names = {id(p): clean_path(name) for name, p in model.named_parameters()}
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    known = _Known(
        parameters={clean_path(name): p for name, p in model.named_parameters()},
        names=names,
        held={id(p) for p in listed},
    )
    orphans = tuple(orphan for group in optimizer.param_groups for orphan in known.orphans(group))
    own = sum(id(p) in names for p in listed)
    return Strangers(orphans, len(listed) - own - len(orphans), own)


@dataclass(frozen=True, eq=False)
class _Known:
    """What the model has, in its order, and the optimizer holds."""

    parameters: dict[str, Tensor]
    names: dict[int, str]
    held: set[int]

    def orphans(self, group: dict[str, Any]) -> Iterator[Orphan]:
        """Yield those of one group: each run of strangers is looked at with its neighbours."""
        parameters: list[Tensor] = group["params"]
        called = group.get("param_names") or [""] * len(parameters)
        numbered = enumerate(parameters)
        for strange, run in groupby(numbered, key=lambda item: id(item[1]) not in self.names):
            if not strange:
                continue
            places = [i for i, _ in run]
            before = parameters[places[0] - 1] if places[0] > 0 else None
            after = parameters[places[-1] + 1] if places[-1] + 1 < len(parameters) else None
            strangers = [parameters[i] for i in places]
            heirs = self._named([called[i] for i in places]) or self._placed(
                strangers, before, after
            )
            if heirs:
                for parameter, heir in zip(strangers, heirs, strict=True):
                    yield Orphan(parameter, _owner(heir), heir)
            elif before is not None and after is not None and _was_norm(strangers, before):
                for parameter in strangers:
                    yield Orphan(parameter, _owner(self.names[id(before)]), None)

    def _named(self, called: Sequence[str]) -> list[str] | None:
        """Return the model's parameters of these names, if all are there and in no group."""
        names = [clean_path(name) for name in called]
        there = all(
            name in self.parameters and id(self.parameters[name]) not in self.held for name in names
        )
        return names if there else None

    def _placed(
        self, strangers: Sequence[Tensor], before: Tensor | None, after: Tensor | None
    ) -> list[str] | None:
        """Return the model's parameters between the neighbours that are like the strangers."""
        order = list(self.parameters)
        start = 0 if before is None else order.index(self.names[id(before)]) + 1
        stop = len(order) if after is None else order.index(self.names[id(after)])
        free = [x for x in order[start:stop] if id(self.parameters[x]) not in self.held]
        n = len(strangers)
        for first in range(len(free) - n + 1):
            heirs = free[first : first + n]
            if _alike(strangers, [self.parameters[name] for name in heirs]):
                return heirs
        enclosed = before is not None and after is not None and len(free) == n
        same_ranks = [self.parameters[name].dim() for name in free] == [p.dim() for p in strangers]
        return free if enclosed and same_ranks else None  # pruned, or of another width


def _alike(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Tell whether shapes are the same, or those of one layer with another number of outputs.

    A single parameter proves nothing: half of all modules have one of that shape.
    """
    if len(a) < 2:
        return False
    if [p.shape for p in a] == [p.shape for p in b]:
        return True
    layer = len(a) == 2 and all(w.dim() > 1 and bias.shape == w.shape[:1] for w, bias in (a, b))
    return layer and a[0].shape[1:] == b[0].shape[1:]


def _was_norm(strangers: Sequence[Tensor], before: Tensor) -> bool:
    """Tell whether they are the weight and bias of a norm of what the layer before puts out."""
    return len(strangers) == 2 and all(p.shape == before.shape[:1] for p in strangers)


def _owner(name: str) -> str:
    return name.rpartition(".")[0]
