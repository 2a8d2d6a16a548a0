"""Re-estimating running statistics with the weights fixed: plan, gather, prepare, commit."""

from __future__ import annotations

from typing import Literal

from torch import nn

from stillnorm.calibration.change import Change
from stillnorm.calibration.commit import write_all
from stillnorm.calibration.pooled import Pass, pooled_pass
from stillnorm.calibration.report import RecalibrationReport
from stillnorm.calibration.targets import find_targets
from stillnorm.errors import CalibrationError
from stillnorm.norms import Layers
from stillnorm.tracing import Forward


def recalibrate(
    model: nn.Module,
    batches: object,
    layers: Layers = None,
    *,
    forward: Forward | None = None,
    method: Literal["pooled"] = "pooled",
) -> RecalibrationReport:
    r"""Re-estimate the running statistics of norm layers on data, with all weights fixed.

    For a model whose `eval()` is far from its training: after few or noisy updates, pruning, weight
    averaging, a change of domain, training with momentum 0. Also called PreciseBN, `update_bn`,
    batch norm re-estimation, adaptation or calibration.

    Use **training data**, with the preprocessing of training, not test data: the statistics are
    parameters like any other, and estimating them on the test set is training on the test set.

    Each layer gets the moments of all the values it receives, pooled over all batches:

    .. math:: \mu = \frac{1}{n} \sum_b n_b \mu_b, \qquad
              \sigma^2 = \frac{1}{n - 1} \sum_b \left( M_b + n_b (\mu_b - \mu)^2 \right)

    so that a smaller last batch counts for what it is and the spread between batches is in the
    variance. Meanwhile the layers normalise by the batch as in training: the result depends on how
    the samples are divided into batches, not on the order of the batches. Take the batch size
    of training. A batch with one value per channel, at which torch raises in train mode, counts
    too; the layer passes it on by the statistics it has.

    A layer used at several places gets the moments of all of them together, which may fit none.

    Args:
        model: The model, in whatever mode.
        batches: Iterated once: a DataLoader, a list of batches, an iterator; a tensor or a mapping
            is one batch. Of ``(inputs, target)`` the inputs are used; a mapping is keyword
            arguments.
        layers: Which layers; see `select`. Held layers (by `freeze`, as another library's frozen
            layer, by a `train()` of the model's own) are left alone unless selected by this. Those
            go on normalising by their running statistics during the pass.
        forward: ``(model, batch) -> output``, where the model cannot be called on a batch itself.
        method: "pooled": one pass, as described.

    Returns:
        Per layer the statistics before and after; what was left alone and why; `undo()`.

    Raises:
        CalibrationError: There is no batch; or a layer receives NaN or infinity, or statistics that
            its dtype cannot hold.
        BatchError: A batch does not fit the model, or the forward raised.
        SelectorError: `layers` matches nothing.
        StateError: The model has lazy modules.

    Shape:
        A layer's input is ``(N, C, *)``; its statistics are ``(C,)``, accumulated in float64 and
        rounded once to the dtype of the buffers.

    Mutates:
        `running_mean`, `running_var` (in place) and `num_batches_tracked`, which grows by the
        number of calls as in training, of the layers in `.layers`: all of them or, if anything is
        raised, Ctrl-C included, none. Modes, momentum, hooks, gradients and random states are as
        found.

    Cost:
        One forward without gradients per batch. Where a layer's own sums are exact (contiguous maps
        on the CPU) nothing more; elsewhere about what its train-mode batch norm costs once more.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
        >>> report = recalibrate(net, [torch.randn(32, 4), torch.randn(5, 4)])
        >>> report.layers[0].path, report.layers[0].count
        ('1', 37)
        >>> report.undo()
        >>> net[1].running_mean.abs().max().item()
        0.0

    Source:
        Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3. fvcore's PreciseBN and
        `torch.optim.swa_utils.update_bn` are the same idea without the guarantees.
    """
    if method != "pooled":
        raise CalibrationError(f"there is no method {method!r}", help='method="pooled"')
    targets = find_targets(model, layers)
    if targets.chosen:
        gathered = pooled_pass(model, targets.chosen, batches, forward)
    else:
        gathered = Pass({}, batches=0, samples=0)
    pools = gathered.pools.items()
    changes = [
        Change.of(layer, pool, statistics)
        for layer, pool in pools
        if (statistics := pool.estimate()) is not None
    ]
    refused = tuple(
        (layer.path, "received at most one value per channel, which has no variance")
        for layer, pool in pools
        if pool.calls and pool.estimate() is None
    )
    report = RecalibrationReport(
        layers=tuple(change.reported() for change in changes),
        unreached=tuple(layer.path for layer, pool in pools if not pool.calls),
        held=tuple(layer.path for layer in targets.held),
        refused=targets.refused + refused,
        batches=gathered.batches,
        samples=gathered.samples,
        _before={change.layer.module: change.before for change in changes},
    )
    write_all([pair for change in changes for pair in change.pairs()])
    return report
