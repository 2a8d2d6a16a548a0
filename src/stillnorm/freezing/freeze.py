"""The verbs: `freeze`, `unfreeze`, `is_frozen`."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import nn

from stillnorm.errors import RefusedError, StillnormWarning
from stillnorm.folding.training import Example, find_foldable, fold_in_training
from stillnorm.freezing.report import FreezeReport, UnfreezeReport
from stillnorm.holding import hold, part_unheld, release, remember, why_not, why_not_release
from stillnorm.norms import Layers, NormLayer, probe_modes, select
from stillnorm.norms.hold import Affine
from stillnorm.tracing import Forward, looking
from stillnorm.tracing.saved import saved_bytes

FoldWhen = Literal["pays", "always"]


def freeze(
    model: nn.Module,
    layers: Layers = None,
    *,
    affine: Affine = "frozen",
    fold_on: object = None,
    fold_when: FoldWhen = "pays",
    forward: Forward | None = None,
    strict: bool = False,
) -> FreezeReport:
    r"""Hold the running statistics of norm layers, so that they stay frozen through everything.

    A held layer normalises by its running statistics and never updates them, in train mode too:

    .. math:: y = \frac{x - \text{running\_mean}}{\sqrt{\text{running\_var} + \epsilon}}
              \cdot \text{weight} + \text{bias}

    It is the same module object with the same parameters, buffers, hooks and `state_dict` keys.
    Its class becomes a subclass of its own class that stays in eval through `train()` on the model
    and on the layer, deepcopy, pickle, `torch.compile`, export, DDP and checkpointing. The output
    in eval mode does not change by one bit; gradients are those of an eval-mode layer.

    A layer of Keras, on the torch backend, is held through calls with ``training=True`` and through
    ``model.trainable = True``; files and copies of it, which Keras makes by way of a file, are not.

    Only norm layers are frozen, not the convolutions around them. A hold lives in the process, not
    in the `state_dict`: freeze again after building a model anew. `convert_sync_batchnorm` and
    `torch.jit.script` make new layers and undo a hold; `is_frozen` and `Snapshot.verify` say so.

    A held network wants a smaller learning rate: start at a tenth. Without batch statistics the
    network is no longer invariant to the scale of its weights, and a step that was safe diverges.
    Measured on a small ResNet with statistics that fit the data (98.6 % before the first step),
    fine-tuned at batch size 2, accuracy in eval mode, held against not frozen: 8.4 % against
    88.9 % at learning rate 0.01, 86.6 against 97.7 at 0.001, 97.1 against 98.3 at 0.0003.
    Freezing is not better training; it makes train and eval the same function.

    Args:
        model: The model.
        layers: Which norm layers; see `select`. None for all.
        affine: ``"frozen"`` freezes weight and bias too (no gradient reaches them, and the
            optimizer cannot move them); ``"trains"`` lets them learn.
        fold_on: An example input, as `torch.export` takes it: a tensor, a tuple of positional
            arguments, a mapping of keyword arguments. The held layers that directly follow a
            convolution or linear layer on it are computed inside that, in every step, with exact
            gradients: no pass over the activation, nothing saved for backward, whether affine is
            frozen or trains. What takes another path later is computed as it always was.
        fold_when: ``"pays"`` folds only where a step becomes faster, by the shapes on the example;
            ``"always"`` wherever it can be done.
        forward: ``(model, example) -> output``, where the model cannot be called on the example.
        strict: Raise when any selected layer is refused; then nothing has changed.

    Returns:
        The paths frozen, already frozen, and refused with the reason; with `fold_on` also those
        folded, those held but not folded with the reason, and the bytes that a step saves for
        backward on the example, before and after.

    Raises:
        SelectorError: `layers` matches nothing.
        RefusedError: `strict`, and a layer cannot be held.
        BatchError: The model cannot be called on the example.

    Warns:
        StillnormWarning: Statistics were never estimated: until then the layer is the identity.

    Mutates:
        The layers' class and mode; with ``affine="frozen"`` `requires_grad` and `.grad` of their
        weight and bias; with `fold_on` the class of the convolutions that fold. No tensor's value.
        On any exception nothing.

    Cost:
        With frozen affine a held layer saves no activation for backward and makes one pass over
        its input forward and one backward; with learning affine, that of an eval-mode layer.
        Folded, it costs a few passes over the convolution's weight in place of all this. With
        `fold_on`, three forwards on the example.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> _ = net(torch.randn(4, 3, 8, 8))  # statistics to hold
        >>> freeze(net).frozen
        ('1',)
        >>> _ = net.train()
        >>> is_frozen(net), net[1].training
        (True, False)
        >>> freeze(net, fold_on=torch.randn(4, 3, 8, 8), fold_when="always").folded
        ('1',)

    Source: the need, pytorch/pytorch#66073 and #9046; the learning rate, measured by
    benchmarks/held_learning_rate.py.
    """
    if affine not in ("frozen", "trains"):
        raise ValueError(f"affine={affine!r} is not 'frozen' or 'trains'")
    if fold_when not in ("pays", "always"):
        raise ValueError(f"fold_when={fold_when!r} is not 'pays' or 'always'")
    chosen = select(model, layers)
    done = tuple(norm for norm in chosen if _is_held_so(norm, affine))
    refusals = {
        norm: reason
        for norm in chosen
        if norm not in done and (reason := why_not(norm, affine)) is not None
    }
    todo = tuple(norm for norm in chosen if norm not in done and norm not in refusals)
    refused = tuple((norm.path, reason) for norm, reason in refusals.items())
    if strict and refused:
        raise _refused("frozen", refused)
    # Before anything changes: a warning may be an error here.
    if initial := [norm.path or "(root)" for norm in todo if norm.never_estimated]:
        warnings.warn(
            f"frozen with statistics that were never estimated (mean 0, variance 1): "
            f"{_listed(initial)}\n  help: until then the layer is the identity: load a checkpoint "
            "or sn.recalibrate(model, batches), then freeze",
            StillnormWarning,
            stacklevel=2,
        )
    example = None if fold_on is None else Example(fold_on, forward)
    before = None if example is None else _bytes(model, todo, example)
    with _all_or_nothing() as put_back:
        for norm in todo:
            put_back.append(remember(norm.module))
            hold(norm.module, affine)
        if example is None or before is None:
            return FreezeReport(_paths(todo), _paths(done), refused)
        held = tuple(norm for norm in select(model, layers) if norm.hold is not None)
        found = find_foldable(model, held, example, only_where_it_pays=fold_when == "pays")
        fold_in_training(found, put_back)
        after = _bytes(model, todo, example)
    return FreezeReport(
        _paths(todo),
        _paths(done),
        refused,
        folded=_paths(norm for norm in held if norm not in found.refused),
        not_folded=tuple(
            (norm.path, found.refused[norm]) for norm in held if norm in found.refused
        ),
        bytes_before=before,
        bytes_after=after,
    )


def _bytes(model: nn.Module, norms: Iterable[NormLayer], example: Example) -> int:
    """Count what a step on the example saves for backward, the norms in eval mode."""
    with looking(model), torch.enable_grad():
        for norm in norms:
            norm.module.training = False
        return saved_bytes(model, lambda: example.run(model))


def unfreeze(model: nn.Module, layers: Layers = None) -> UnfreezeReport:
    """Release held layers: the model is as if `freeze` had never been called.

    Class, identity, hooks, momentum and `requires_grad` are those from before; the mode is the one
    that the `train()` and `eval()` calls since then would have given. Tensors keep their values.

    Args:
        model: The model.
        layers: Which norm layers; see `select`. None for all.

    Returns:
        The paths unfrozen, those that stillnorm did not hold, and refused with the reason.

    Raises:
        SelectorError: `layers` matches nothing.

    Mutates:
        The layers' class, mode and `requires_grad`. On any exception nothing.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, momentum=0.03))
        >>> _ = net(torch.randn(8, 2)), freeze(net), net.train()
        >>> unfreeze(net).unfrozen, type(net[1]).__name__, net[1].training, net[1].momentum
        (('1',), 'BatchNorm1d', True, 0.03)
    """
    chosen = select(model, layers)
    held = tuple(norm for norm in chosen if norm.hold is not None)
    refusals = {norm: reason for norm in held if (reason := why_not_release(norm)) is not None} | {
        norm: reason for norm in chosen if (reason := _foreign(norm)) is not None
    }
    todo = tuple(norm for norm in held if norm not in refusals)
    report = UnfreezeReport(
        unfrozen=_paths(todo),
        not_held=_paths(norm for norm in chosen if norm not in held and norm not in refusals),
        refused=tuple((norm.path, reason) for norm, reason in refusals.items()),
    )
    with _all_or_nothing() as put_back:
        for norm in todo:
            put_back.append(remember(norm.module))
            release(norm.module)
        part_unheld(model, put_back)
    return report


def is_frozen(model: nn.Module, layers: Layers = None) -> bool:
    """Tell whether the layers would stay frozen through `.train()`.

    Args:
        model: The model.
        layers: Which norm layers; see `select`. None for all.

    Returns:
        True when every selected layer would still normalise by its running statistics, and not
        update them, after `.train()` on the model and on the layer itself: it is held, it is
        another library's frozen layer, or its own class overrides `train()`. Of a layer of Keras,
        in calls with ``training=True``: it is held, or ``trainable=False``.

    Raises:
        SelectorError: `layers` matches nothing.

    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(4)).eval()
        >>> is_frozen(net)  # net.train() would thaw it
        False
    """
    return all(_stays_frozen(norm) for norm in select(model, layers))


def _stays_frozen(norm: NormLayer) -> bool:
    training = probe_modes(norm.module).in_train[norm.module]
    by = norm.normalizes_by(training)
    return by == "running" and not norm.updates_statistics(training)


def _is_held_so(norm: NormLayer, affine: Affine) -> bool:
    if norm.family == "frozen":
        return affine == "frozen"
    return norm.hold is not None and norm.hold.affine == affine


def _foreign(norm: NormLayer) -> str | None:
    if norm.family != "frozen":
        return None
    return f"a {norm.kind} of {norm.provider} has no unfrozen form of itself"


@contextlib.contextmanager
def _all_or_nothing() -> Iterator[list[Callable[[], None]]]:
    """Let the block make changes, each noted before it is made; on any exception take them back."""
    put_back: list[Callable[[], None]] = []
    try:
        yield put_back
    except BaseException:
        for undo in reversed(put_back):
            undo()
        raise


def _refused(verb: str, refused: tuple[tuple[str, str], ...]) -> RefusedError:
    path, reason = refused[0]
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    return RefusedError(
        f"{path or '(root)'} cannot be {verb}: {reason}{more}",
        help="nothing was changed; leave strict=True out to change the others",
    )


def _paths(norms: object) -> tuple[str, ...]:
    return tuple(norm.path for norm in norms)  # type: ignore[attr-defined]


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")
