"""The verb `fold`: a new model for inference, with the norms folded away."""

from __future__ import annotations

from torch import nn

from stillnorm.errors import StateError
from stillnorm.folding.agreement import difference, wrong_folds
from stillnorm.folding.build import fold_copy, norms_of
from stillnorm.folding.report import FoldReport
from stillnorm.folding.training import Example
from stillnorm.norms import must_be_a_model
from stillnorm.tracing.calling import Forward


def fold(model: nn.Module, example: object, *, forward: Forward | None = None) -> FoldReport:
    r"""Make a new model for inference in which convolutions have absorbed their norms.

    .. math:: \frac{(Wx + b) - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta = (W s) x + b',
              \quad s = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}},
              \quad b' = (b - \mu) s + \beta

    Norms behind a convolution or linear layer fold, and norms directly before one, zero padding
    included. Who feeds whom is seen on the example, not guessed from the order of declaration. The
    arithmetic is in float64, rounded once. The result is made of plain torch layers: it loads,
    pickles and exports without stillnorm. Where the norm had an activation inside (timm), that
    stays in its place.

    Args:
        model: The model. Its norms are folded as they are in eval mode.
        example: An input, as `torch.export` takes it: a tensor, a tuple of positional arguments,
            a mapping of keyword arguments.
        forward: ``(model, example) -> output``, where the model cannot be called on the example.

    Returns:
        The new model in eval mode, the norms that are gone, those that stay with the reason, and
        the measured errors. A norm is folded only if, on its own input and against float64, the
        root mean square error is at most twice that of the two layers plus 4 ulp; and if the whole
        model, in float64, still computes the same on the example.

    Raises:
        BatchError: The model cannot be called on the example.
        StateError: The model has lazy modules, or the folded model does not run as the other does.

    Mutates:
        Nothing: the model given stays as it is.

    Cost:
        A copy of the model and one in float64, three forwards on the example in each, and each
        folded layer's in float64.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> report = fold(net, torch.randn(2, 3, 8, 8))
        >>> report.folded, report.model
        (('1',), Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        ))

    Source: the need, pytorch/pytorch#104593, #180995 and #119264, where folds that go by the order
    or by the sizes of layers are wrong.
    """
    must_be_a_model(model)
    given = Example(example, forward)
    wrong = wrong_folds(model, given)
    done = fold_copy(model, given, wrong or {})
    refused = {norm.path: why for norm, why in done.plan.refused.items()}
    for one, number in done.numbered:
        if number in done.barred:
            refused |= {norm.path: done.barred[number] for norm in norms_of(one)}
    error, bound = difference(done.output, done.expected)
    if error > bound:
        raise StateError(
            f"the folded model's output is off by {error:.2g} of its largest value",
            help="every norm that folded is right on its own input; please report this model",
        )
    return FoldReport(
        model=done.model,
        folded=tuple(path for path in done.paths if path not in refused),
        refused=tuple((path, refused[path]) for path in done.paths if path in refused),
        max_error=error,
        judged_whole=wrong is not None,
        errors={n.path: e for n, e in done.plan.errors.items() if n.path not in refused},
    )
