"""Whether a folded model is the same function: judged in float64, where rounding hides nothing.

Each fold is measured on its own layer's input; what only the whole shows is judged here: a layer
that does more than it says, code that reads a layer's weight, a use that no trace of calls sees.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from stillnorm.errors import StateError
from stillnorm.folding.build import fold_copy, norms_of, plain_copy
from stillnorm.folding.inference import Fold
from stillnorm.folding.training import Example
from stillnorm.tracing.batches import tensors_in
from stillnorm.tracing.flow import looking

_SAME = 1e-8  # of the largest value, in float64: far above its rounding, far below any mistake


def wrong_folds(model: nn.Module, example: Example) -> dict[int, str] | None:
    """Return the layers, by number, in which a fold would make the model another function.

    Returns:
        The reasons by number; None where nothing can be known, for the model does not run in
        float64.

    Cost:
        Three forwards in float64; where something is wrong, three more for each fold.
    """
    double = Example(tree_map(_to_double, example.value), example.forward)
    copied = plain_copy(model).to(torch.float64)
    try:
        with looking(copied):
            double.run(copied)
    except Exception:
        return None

    def is_same(barred: dict[int, str]) -> bool:
        try:
            done = fold_copy(model, double, barred, torch.float64)
        except StateError:  # it does not run
            return False
        numbered.extend(done.numbered if not numbered else ())
        return difference(done.output, done.expected)[0] <= _SAME

    numbered: list[tuple[Fold, int]] = []
    if is_same({}):
        return {}
    if not numbered:
        numbered = _all_folds(model, double)
    every = dict.fromkeys((number for _, number in numbered), _OTHER)
    bad: dict[int, str] = {}
    for group in _groups(numbered):
        others = {number: why for number, why in every.items() if number not in group}
        if not is_same(others):
            bad |= dict.fromkeys(group, _OTHER)
    return bad if is_same(bad) else every


_OTHER = "folded, the model computes something else on the example, or does not run"


def _all_folds(model: nn.Module, example: Example) -> list[tuple[Fold, int]]:
    """Return the folds of a model whose folded copy does not run: bar them all, and it does."""
    everything = {number: _OTHER for number, _ in enumerate(plain_copy(model).modules())}
    return fold_copy(model, example, everything, torch.float64).numbered


def _groups(numbered: list[tuple[Fold, int]]) -> list[set[int]]:
    """Group the layers that share a norm."""
    groups: list[tuple[set[int], set[nn.Module]]] = []
    for one, number in numbered:
        numbers, norms = {number}, {norm.module for norm in norms_of(one)}
        for group in [g for g in groups if g[1] & norms]:
            groups.remove(group)
            numbers, norms = numbers | group[0], norms | group[1]
        groups.append((numbers, norms))
    return [numbers for numbers, _ in groups]


def _to_double(leaf: object) -> object:
    floats = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.double() if floats else leaf  # type: ignore[attr-defined]


def difference(output: object, expected: object) -> tuple[float, float]:
    """Return the largest difference of two outputs, and the largest that rounding explains.

    Returns:
        Both relative to the largest value of the tensor; infinite where integers differ in
        float64, which no rounding explains, or where the outputs do not correspond.
    """
    a, b = list(tensors_in(output)), list(tensors_in(expected))
    if [t.shape for t in a] != [t.shape for t in b]:
        return math.inf, 0.0
    worst, bound = 0.0, math.inf
    exact = all(t.dtype == torch.float64 for t in b if t.is_floating_point())
    for x, y in zip(a, b, strict=True):
        if not y.is_floating_point():
            if exact and not torch.equal(x, y):
                return math.inf, 0.0
            continue
        eps = torch.finfo(y.dtype).eps
        finite = y.isfinite()
        if not bool(finite.any()):
            continue
        x, y = x[finite].double(), y[finite].double()
        error = float((x - y).abs().max() / y.abs().max().clamp(min=1e-30))
        worst = max(worst, math.inf if math.isnan(error) else error)
        bound = min(bound, 16 * eps**0.5)
    return worst, bound
