"""Folding held norms into the convolutions before them, for training: what `freeze` does."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillnorm.convolutions import Convolution, convolve, convolve_normalized
from stillnorm.folding.algebra import affine_of, two_layers
from stillnorm.folding.error import FoldError, fold_error, measured_in
from stillnorm.folding.pairs import Candidates, find_candidates
from stillnorm.holding import remember
from stillnorm.holding.folding import pair_up
from stillnorm.norms import NormLayer, find_norms
from stillnorm.norms.hold import HOLD
from stillnorm.norms.pair import Pair, pair_of
from stillnorm.tracing.batches import copied
from stillnorm.tracing.calling import Forward, call_example
from stillnorm.tracing.flow import looking
from stillnorm.tracing.kernels import Kernel
from stillnorm.tracing.links import LayerCall, Output, Use, links

_SAMPLES = 2  # a float64 convolution of a whole batch would take longer than a training step


@dataclass(frozen=True, eq=False)
class Example:
    """An input to a model, and how to call the model on it.

    Args:
        value: What `torch.export` takes: a tensor, a tuple of arguments, a mapping.
        forward: ``(model, example) -> output``, where that is not the call.
    """

    value: object
    forward: Forward | None

    def run(self, model: nn.Module) -> object:
        """Run the model, on a copy of the example: models write to what they are given."""
        with torch._C.DisableTorchFunction():  # the model's calls are watched, these are ours
            value = copied(self.value)
        return call_example(model, value, self.forward)


def find_foldable(
    model: nn.Module, norms: Collection[NormLayer], example: Example, only_where_it_pays: bool
) -> Candidates:
    """Run the model on the example and tell which of its held norms fold.

    Mutates:
        Nothing.
    """
    errors: dict[tuple[nn.Module, nn.Module], FoldError] = {}

    def measure(output: Output, use: Use, call: LayerCall | None) -> None:
        if isinstance(output.call, Convolution) and isinstance(call, Kernel) and use.by is not None:
            error = _error(output.call, call)
            worst = errors.get((output.module, use.by))
            if error is not None and (worst is None or worst.is_right):
                errors[output.module, use.by] = error

    with looking(model):
        seen = links(model, find_norms(model), lambda: example.run(model), measure)
    return find_candidates(model, norms, seen, errors, only_where_it_pays)


def _error(call: Convolution, kernel: Kernel) -> FoldError | None:
    """Measure the fold on the first samples of the layer's own input."""
    given = kernel.arguments
    mean, var, eps = given["running_mean"], given["running_var"], given.get("eps", 1e-5)
    gamma, beta = given.get("weight"), given.get("bias")
    if call.x.is_meta or mean is None or kernel.used != "running":
        return None
    x, *others = (*call.tensors(), gamma, beta, mean, var)
    x = x[:_SAMPLES]
    if (dtype := measured_in(x.dtype)) != x.dtype:
        x, others = x.to(dtype), [_to(t, dtype) for t in others]
    weight, bias, gamma, beta, mean, var = others
    with torch.autocast(x.device.type, enabled=False):
        plain = convolve(x, weight.to(x.dtype), _to(bias, x.dtype), call.geometry)
        unfolded = F.batch_norm(plain, mean, var, gamma, beta, False, 0.0, eps)
        folded = convolve_normalized(x, weight, bias, gamma, beta, mean, var, eps, call.geometry)
        norm = affine_of(mean, var, gamma, beta, eps)
        exact = two_layers(x, weight, bias, norm, call.geometry, before=False)
    return fold_error(folded.cpu(), unfolded.cpu(), exact)


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def fold_in_training(candidates: Candidates, put_back: list[Callable[[], None]]) -> None:
    """Let the convolutions leave their work to the held norms after them.

    Args:
        candidates: What folds.
        put_back: Receives what undoes each change, before it is made.

    Mutates:
        The class of the convolutions, and the records of the holds.
    """
    for convolutions, norms in candidates.groups:
        pair = next((p for c in convolutions if (p := pair_of(c)) is not None), None) or Pair()
        for convolution in convolutions:
            put_back.append(remember(convolution))
            pair_up(convolution, pair)
        for norm in norms:
            put_back.append(remember(norm.module))
            norm.module.__dict__[HOLD].pair = pair
