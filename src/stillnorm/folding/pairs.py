"""Which held norms can be computed in the convolutions before them, and why the others cannot.

A convolution folds when, on the example, every one of its outputs goes to one held norm and to
nobody else; a norm folds when all its inputs come from such convolutions. Anything else would be
right too (what is used otherwise is computed as it always was) but would convolve twice.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from stillnorm.folding.error import FoldError
from stillnorm.holding.folding import is_convolutional
from stillnorm.holding.hooks import sees_input, sees_output
from stillnorm.norms import NormLayer, walk
from stillnorm.tracing.links import Links, Output


@dataclass(frozen=True, eq=False)
class Candidates:
    """What folds on an example.

    Args:
        groups: Convolutions and norms that go together: most often one of each.
        refused: By norm, why it does not fold.
    """

    groups: tuple[tuple[tuple[nn.Module, ...], tuple[NormLayer, ...]], ...]
    refused: Mapping[NormLayer, str]


def find_candidates(
    model: nn.Module,
    norms: Collection[NormLayer],
    links: Links,
    errors: Mapping[tuple[nn.Module, nn.Module], FoldError],
    only_where_it_pays: bool,
) -> Candidates:
    """Sort the norms into those that fold and those that do not.

    Args:
        model: The model.
        norms: The held norms in question.
        links: Who fed whom on the example.
        errors: By (convolution, norm), the worst rounding error of the fold on the example.
        only_where_it_pays: Leave out what would be slower folded.
    """
    standing = _Standing(model, norms)
    refused: dict[NormLayer, str] = {}
    by_convolution: dict[nn.Module, list[Output]] = {}
    for output in links.outputs:
        if is_convolutional(output.module):
            by_convolution.setdefault(output.module, []).append(output)
    for norm in norms:
        reason = _why_not_norm(norm, links)
        if reason is not None:
            refused[norm] = reason
    bad: dict[nn.Module, str] = {}
    for module, outputs in by_convolution.items():
        reason = standing.why_not(module, outputs) or _too_far_off(module, outputs, errors)
        if reason is None and only_where_it_pays:
            reason = _why_not_paying(outputs)
        if reason is not None:
            bad[module] = reason
    while _spread(norms, refused, bad, links, by_convolution, standing):
        pass
    ordered = {norm: refused[norm] for norm in norms if norm in refused}
    return Candidates(_groups(norms, refused, links), ordered)


class _Standing:
    """Where layers stand in a model: their paths, and what is around them."""

    def __init__(self, model: nn.Module, norms: Collection[NormLayer]) -> None:
        self.norms = {norm.module: norm for norm in norms}
        self.paths: dict[nn.Module, str] = {}
        self._around: dict[nn.Module, set[nn.Module]] = {}
        for path, module, ancestors in walk(model):
            self.paths.setdefault(module, path or "(root)")
            self._around.setdefault(module, set()).update(
                m for m in (*ancestors, module) if _is_boundary(m)
            )

    def why_not(self, module: nn.Module, outputs: list[Output]) -> str | None:
        """Return the reason why a convolution does not fold, or None."""
        path = self.paths.get(module, type(module).__name__)
        if sees_output(module):
            return f"a hook on {path} sees the convolution's output"
        if "forward" in vars(module):
            return f"the forward of {path} was replaced on the instance"
        for output in outputs:
            uses = output.uses
            others = [use for use in uses if use.by not in self.norms]
            if not others and not uses:
                return f"the output of {path} is used by nobody that can be seen"
            if others and len(uses) == 1:
                return f"{others[0]} stands after {path}"
            if len(uses) > 1:
                second = others[0] if others else uses[1]
                return f"{second} uses the output of {path} too: it would be computed twice"
            if output.is_stale:
                return f"the input or weight of {path} is written before the norm, or sharded again"
            if output.is_kept:
                return f"the output of {path} is returned or stored: it would be computed twice"
            norm = uses[0].by
            if norm is not None and self._around.get(norm) != self._around.get(module):
                return f"{path} and the norm are compiled or sharded apart"
        return None


_SHARDED = ("FSDPModule", "FullyShardedDataParallel")


def _is_boundary(module: nn.Module) -> bool:
    """Tell whether a module is compiled on its own, or sharded (its weights come and go)."""
    return (
        hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        or any(
            c.__name__ in ("FSDPModule", "FullyShardedDataParallel") for c in type(module).__mro__
        )
    )


def _why_not_norm(norm: NormLayer, links: Links) -> str | None:
    """Return the reason that lies in the norm and its inputs, or None."""
    if norm.family == "keras":
        return "is a layer of Keras, whose convolutions do not fold"
    sources = links.sources.get(norm.module)
    if not sources:
        return "the example does not reach it"
    if sees_input(norm.module):
        return "a hook on it sees its input"
    for source in sources:
        if source is None:
            return "its input is none that the model computes"
        if isinstance(source, str):
            return f"{source} stands before it, not a convolution that folds"
        if not is_convolutional(source.module):
            kind = getattr(type(source.module), "held_base", type(source.module))
            return f"a {kind.__name__} stands before it, not a convolution"
    return None


def _too_far_off(
    module: nn.Module,
    outputs: list[Output],
    errors: Mapping[tuple[nn.Module, nn.Module], FoldError],
) -> str | None:
    for output in outputs:
        for use in output.uses:
            error = None if use.by is None else errors.get((module, use.by))
            if error is not None and not error.is_right:
                return f"the fold would be {error}"
    return None


# Measured (benchmarks/folded_layer.py): the passes over the weight cost as much as the norm's over
# 1.8 elements of its map for each of the weight's, and the call as much as 2^17 elements.
_PER_WEIGHT = 1.8
_PER_CALL = 1 << 17


def _why_not_paying(outputs: list[Output]) -> str | None:
    """Return why a fold would be slower than the norm alone, or None."""
    for output in outputs:
        if math.prod(output.shape) < _PER_WEIGHT * output.weight_size + _PER_CALL:
            return "a map too small to pay for its weight (fold_when='always' folds it)"
    return None


def _spread(
    norms: Collection[NormLayer],
    refused: dict[NormLayer, str],
    bad: dict[nn.Module, str],
    links: Links,
    by_convolution: Mapping[nn.Module, list[Output]],
    standing: _Standing,
) -> bool:
    """Carry refusals from convolutions to their norms and back; tell whether one was new."""
    before = len(refused) + len(bad)
    for norm in norms:
        for source in links.sources.get(norm.module, ()):
            if norm not in refused and isinstance(source, Output) and source.module in bad:
                refused[norm] = bad[source.module]
    by_module = {norm.module: norm for norm in refused}
    for module, outputs in by_convolution.items():
        for use in (use for output in outputs for use in output.uses):
            if module not in bad and use.by in by_module:
                other = by_module[use.by]
                bad[module] = (
                    f"{standing.paths.get(module)} feeds {other.path or '(root)'} too: "
                    f"{refused[other]}"
                )
    return len(refused) + len(bad) > before


def _groups(
    norms: Collection[NormLayer], refused: Mapping[NormLayer, str], links: Links
) -> tuple[tuple[tuple[nn.Module, ...], tuple[NormLayer, ...]], ...]:
    """Group what shares a convolution or a norm."""
    groups: list[tuple[dict[nn.Module, None], list[NormLayer]]] = []
    for norm in norms:
        if norm in refused:
            continue
        sources = (s for s in links.sources[norm.module] if isinstance(s, Output))
        merged: tuple[dict[nn.Module, None], list[NormLayer]] = (
            dict.fromkeys(source.module for source in sources),
            [norm],
        )
        apart = []
        for group in groups:
            if group[0].keys() & merged[0].keys():
                merged = ({**group[0], **merged[0]}, [*group[1], *merged[1]])
            else:
                apart.append(group)
        groups = [*apart, merged]
    return tuple((tuple(convolutions), tuple(group)) for convolutions, group in groups)
