"""Re-estimating running statistics with the weights fixed: plan, gather, prepare, commit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from stillnorm.calibration.change import Change
from stillnorm.calibration.commit import write_all
from stillnorm.calibration.data import Data
from stillnorm.calibration.pooled import Pass, pooled_pass
from stillnorm.calibration.progress import OnProgress
from stillnorm.calibration.ranks import Group, Ranks
from stillnorm.calibration.report import Method, RecalibrationReport
from stillnorm.calibration.sequential import sequential_pass
from stillnorm.calibration.targets import find_targets
from stillnorm.errors import CalibrationError
from stillnorm.norms import Layers, NormLayer, must_be_a_model
from stillnorm.tracing import Forward, device_of


def recalibrate(
    model: nn.Module,
    batches: object,
    layers: Layers = None,
    *,
    forward: Forward | None = None,
    method: Method = "pooled",
    max_batches: int | None = None,
    tolerance: float | None = None,
    progress: OnProgress | None = None,
    group: Group = None,
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
    variance. What it receives depends on the method:

    - "pooled": the layers normalise by the batch meanwhile, as in training. One pass. The result
      depends on how the samples are divided into batches, not on the order of the batches: take the
      batch size of training. A batch with one value per channel, at which torch raises in train
      mode, counts too; the layer passes it on by the statistics it has.
    - "sequential": every layer receives what the layers before it give in eval mode, with their new
      statistics. That is the fixed point of eval: recalibrating again changes nothing. The result
      does not depend on how the samples are divided.

    A layer used at several places gets the moments of all of them together, which may fit none; it
    is listed in `.shared`. A layer that is given what comes of its own output has no fixed point:
    "sequential" takes what it received first, and lists it in `.circular`.

    Args:
        model: The model, in whatever mode.
        batches: Iterated once: a DataLoader, a list of batches, an iterator; a tensor or a mapping
            is one batch. Of ``(inputs, target)`` the inputs are used; a mapping is keyword
            arguments.
        layers: Which layers; see `select`. Held layers (by `freeze`, as another library's frozen
            layer, by a `train()` of the model's own) are left alone unless selected by this. Those
            go on normalising by their running statistics during the pass.
        forward: ``(model, batch) -> output``, where the model cannot be called on a batch itself.
        method: "pooled" or "sequential", as described.
        max_batches: Stop after so many.
        tolerance: Stop as soon as the standard error of every layer's mean, in deviations, and of
            its variance, relative to it, is at most this (root mean square over the channels), but
            not before eight batches. The batches must come in random order.
        progress: Called after every batch with a `Progress`; `print` will do.
        group: In a distributed run, the processes that share the work, each with batches of its
            own, as many as it has: all of them must call, and all get the same statistics. Default:
            all processes of the default group, if there is one. "self": this process alone.

    Returns:
        Per layer the statistics before and after, with their standard errors; what was left alone
        and why; `undo()`.

    Raises:
        CalibrationError: There is no batch; or a layer receives NaN or infinity, or statistics that
            its dtype cannot hold; or another rank failed; or, with "sequential", the model computes
            something else each time, or is distributed by `fully_shard`; or a layer of Keras is
            given a mask.
        ModelError: `model` is no model of torch's.
        BatchError: A batch does not fit the model, or the forward raised.
        SelectorError: `layers` matches nothing.
        StateError: The model has lazy modules.

    Shape:
        A layer's input is ``(N, C, *)``, in Keras as `axis` says; its statistics are ``(C,)``,
        accumulated in float64 and rounded once to the dtype of the buffers. Keras keeps the biased
        variance.

    Mutates:
        `running_mean`, `running_var` (in place) and `num_batches_tracked`, which grows by the
        number of calls as in training, of the layers in `.layers`: all of them or, if anything is
        raised, Ctrl-C included, none. Modes, momentum, hooks, gradients and random states are as
        found.

    Cost:
        "pooled": one forward without gradients per batch, about what it costs in train mode.
        "sequential": two more, in which every layer is run once, and the model's Python again for
        every layer that waits for another, which is what counts where maps are small. The batches
        are kept, and what is alive at one point of their forwards, of as many as fit into half of
        the free memory; one that does not fit is run again from the beginning for every layer.
        Between processes one collective of 88 bytes per channel; with "sequential" one for every
        layer that waits for another.

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
    must_be_a_model(model)
    passes = _PASSES.get(method)
    if passes is None:
        raise CalibrationError(
            f"there is no method {method!r}", help='method="pooled" or method="sequential"'
        )
    data = Data(batches, forward, max_batches, tolerance, progress)
    targets = find_targets(model, layers)
    if targets.chosen:
        gathered = passes(model, targets.chosen, data, Ranks(group, device_of(model)))
    else:
        gathered = Pass([], batches=0, samples=0)
    changes = [
        Change.of(pool, moments)
        for pool in gathered.pools
        if (moments := pool.estimate()) is not None
    ]
    refused = tuple(
        (pool.layer.path, "received at most one value per channel, which has no variance")
        for pool in gathered.pools
        if pool.calls and pool.estimate() is None
    )
    report = RecalibrationReport(
        layers=tuple(change.reported() for change in changes),
        unreached=tuple(pool.layer.path for pool in gathered.pools if not pool.calls),
        held=tuple(layer.path for layer in targets.held),
        shared=tuple(pool.layer.path for pool in gathered.pools if pool.is_shared),
        circular=tuple(layer.path for layer in gathered.circular),
        refused=targets.refused + refused,
        method=method,
        tolerance=tolerance,
        batches=gathered.batches,
        samples=gathered.samples,
        _before={change.layer.module: change.before for change in changes},
    )
    write_all([pair for change in changes for pair in change.pairs()])
    return report


_PASSES: dict[str, Callable[[nn.Module, Sequence[NormLayer], Data, Ranks], Pass]] = {
    "pooled": pooled_pass,
    "sequential": sequential_pass,
}
