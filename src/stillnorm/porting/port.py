"""The verbs: `from_keras`, `to_keras`, `compare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from stillnorm.errors import PortError, RefusedError, StateError
from stillnorm.norms import same_bits
from stillnorm.porting.part import Refusal
from stillnorm.porting.report import Agreement, Ported, PortReport
from stillnorm.porting.torch_layers import TorchPart
from stillnorm.porting.torch_layers import parts_of as torch_parts
from stillnorm.repair.surgery import Surgery, refuse_wrapped

if TYPE_CHECKING:
    from stillnorm.porting.keras_layers import KerasPart
    from stillnorm.porting.matching import Matching, Names, Pair

Which = Literal["all", "norms"]
To = Literal["torch", "keras"]
Count = int | Mapping[str, int] | None

TOLERANCE = 1e-4


def from_keras(
    keras_model: Any,
    model: nn.Module,
    *,
    names: Names = None,
    which: Which = "all",
    count: Count = None,
    example: object = None,
    torch_example: object = None,
    tolerance: float = TOLERANCE,
    strict: bool = True,
) -> PortReport:
    r"""Give a torch model the weights of a Keras 3 model, and its norms what they do there.

    Both models exist and are the same network. Ported are batch norms, convolutions (depthwise,
    separable and transposed ones too) and dense layers: kernels in torch's layout, after a
    `Flatten` in torch's order of features. Of batch norms also what no file of weights has:

    - momentum: torch's is 1 minus Keras';
    - eps: 1e-3 in Keras unless set, 1e-5 in torch;
    - the statistics. Keras keeps the biased variance, torch n / (n - 1) times it. Without `count`
      the value is kept, and with it the output in eval mode; training goes on in torch's
      convention;
    - a missing gamma or beta: a weight of 1 or bias of 0 that does not learn;
    - ``trainable=False``, which in Keras means inference mode: the layer is held, see `freeze`.

    `trainable` of other layers, optimizer state and `num_batches_tracked` (Keras counts none) are
    not ported.

    Args:
        keras_model: The Keras model, built, on any backend.
        model: The torch model.
        names: A map, or a function, of the names of Keras layers to paths of torch layers: layers
            inside others as ``"encoder/conv1"``, the halves of a separable convolution as
            ``"sep/depthwise"`` and ``"sep/pointwise"``. A map ports what it names and no more.
            Default: the same names, with ``_``, ``.`` and ``/`` taken for one; or else the same
            order among layers of a kind.
        which: ``"norms"`` for batch norms alone.
        count: n, the number of values in each channel of the batches behind the statistics: batch
            size times height times width; or a map of torch paths to it. With it the variance
            becomes the unbiased one.
        example: An input of the Keras model, an array or a tensor, or several in a tuple or a
            mapping. With it both models are run, see `compare`, and where they do not agree the
            port is taken back.
        torch_example: The same input as the torch model takes it, where that is not the example
            with its channels moved to axis 1.
        tolerance: How much the outputs may differ, relative to the largest of them.
        strict: Raise where a layer with weights cannot be ported; otherwise it is left alone and
            reported.

    Returns:
        What was ported, with notes; what was refused, and why; how well the models agree;
        `undo()`.

    Raises:
        PortError: The models cannot be matched layer by layer, or do not agree on the example.
        RefusedError: `strict`, and a layer cannot be ported.
        StateError: The torch model is wrapped for distributed training; or two of its layers share
            a tensor and would have to hold different values.

    Mutates:
        The torch model: values in place; eps, momentum, class (held) and `requires_grad` of batch
        norms. All of it or, if anything is raised, nothing.

    Cost:
        Two copies of the weights; with an example, two forwards of either model.

    Example:
        >>> import keras
        >>> there = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> here = nn.BatchNorm1d(4)
        >>> report = from_keras(there, here, example=torch.randn(8, 4))
        >>> here.eps, here.momentum, bool(report.agreement)
        (0.001, 0.01, True)

    Source: keras/src/layers/normalization/batch_normalization.py of Keras 3.15;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """
    from stillnorm.porting.semantics import correct, to_torch

    def port(one: KerasPart, twin: TorchPart, surgery: Surgery) -> Iterator[str]:
        if twin.norm is not None:
            yield from to_torch(one, twin.norm, surgery)
            return
        for name, tensor in twin.tensors().items():
            if (value := one.read(name)) is not None:
                if tensor.is_meta:
                    raise Refusal("is on the meta device in torch")
                surgery.write(tensor, value)

    def finish(pair: Pair, n: int, surgery: Surgery) -> None:
        var = pair[1].tensors()["running_var"]
        surgery.write(var, correct(var, n, "torch"))

    return _ported(
        keras_model,
        model,
        "torch",
        names,
        which,
        count,
        example,
        torch_example,
        tolerance,
        strict,
        port,
        finish,
    )


def to_keras(
    model: nn.Module,
    keras_model: Any,
    *,
    names: Names = None,
    which: Which = "all",
    count: Count = None,
    example: object = None,
    torch_example: object = None,
    tolerance: float = TOLERANCE,
    strict: bool = True,
) -> PortReport:
    """Give a Keras 3 model the weights of a torch model, and its norms what they do there.

    The inverse of `from_keras`: what was ported there and back is what it was. A held layer, and
    another library's frozen one, becomes ``trainable=False``; a layer whose statistics are held
    while its affine trains is refused, for Keras has none.

    A compiled Keras model has to be compiled again: what `compile` saw of momentum, epsilon and
    `trainable` stays otherwise.

    Args:
        model: The torch model.
        keras_model: The Keras model, built, on any backend.
        names: Which layer is which, Keras names to torch paths; see `from_keras`, as of the others.
        which: ``"norms"`` for batch norms alone.
        count: n; with it the variance becomes the biased one.
        example: An input of the Keras model, on which both are run.
        torch_example: The same input as the torch model takes it.
        tolerance: How much the outputs may differ.
        strict: Raise where a layer with weights cannot be ported.

    Returns:
        What was ported, with notes; what was refused, and why; how well the models agree;
        `undo()`.

    Raises:
        PortError: The models cannot be matched layer by layer, or do not agree on the example.
        RefusedError: `strict`, and a layer cannot be ported.
        StateError: The torch model is wrapped for distributed training.

    Mutates:
        The Keras model: its variables; epsilon, momentum and `trainable` of batch norms. All of it
        or, if anything is raised, nothing.

    Example:
        >>> import keras
        >>> there = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> _ = to_keras(nn.BatchNorm1d(4), there)
        >>> there.layers[0].epsilon, there.layers[0].momentum
        (1e-05, 0.9)
    """
    from stillnorm.porting.semantics import correct, write_keras
    from stillnorm.porting.semantics import to_keras as norm_to_keras

    def port(one: KerasPart, twin: TorchPart, surgery: Surgery) -> Iterator[str]:
        if twin.norm is not None:
            yield from norm_to_keras(one, twin.norm, surgery)
            return
        for name, tensor in twin.tensors().items():
            if tensor.is_meta:
                raise Refusal("is on the meta device in torch")
            write_keras(surgery, one, name, tensor)

    def finish(pair: Pair, n: int, surgery: Surgery) -> None:
        one, twin = pair
        write_keras(surgery, one, "running_var", correct(twin.tensors()["running_var"], n, "keras"))

    return _ported(
        keras_model,
        model,
        "keras",
        names,
        which,
        count,
        example,
        torch_example,
        tolerance,
        strict,
        port,
        finish,
    )


def compare(
    keras_model: Any,
    model: nn.Module,
    example: object,
    *,
    names: Names = None,
    torch_example: object = None,
    tolerance: float = TOLERANCE,
) -> Agreement:
    r"""Run a Keras and a torch model on the same input: do they compute, and learn, the same?

    In eval mode their outputs are compared. Then each is run once in train mode, dropout switched
    off, and the statistics of its norms are compared: the means as they are, and of the variances
    what Keras moved by, a biased variance of n values, times n / (n - 1), which torch moves by.
    With v and t the running variances of Keras and torch, a prime for afterwards, and m torch's
    momentum:

    .. math:: t' = (1 - m) t + \frac{n}{n - 1} \left( v' - (1 - m) v \right)

    Args:
        keras_model: The Keras model.
        model: The torch model.
        example: An input of the Keras model; see `from_keras`, as of the others.
        names: Which layer is which.
        torch_example: The same input as the torch model takes it.
        tolerance: How much the outputs may differ, relative to the largest of them; statistics,
            relative to the largest of the layer.

    Returns:
        The differences; true where they are within the tolerance.

    Raises:
        PortError: The models cannot be matched layer by layer, or give other outputs.

    Cost:
        Two forwards of either model; a copy of all variables.

    Example:
        >>> import keras
        >>> there = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> here = nn.BatchNorm1d(4, eps=1e-3, momentum=0.01)
        >>> bool(compare(there, here, torch.randn(8, 4)))
        True
        >>> here.momentum = 0.99  # Keras', copied
        >>> bool(compare(there, here, torch.randn(8, 4)))
        False
    """
    matching, _ = _matched(keras_model, model, names, "all")
    from stillnorm.porting.agreement import agreement

    return agreement(keras_model, model, matching.pairs, example, torch_example, tolerance)


# ------------------------------------------------------------------------------- both ways


def _ported(
    keras_model: Any,
    model: nn.Module,
    to: To,
    names: Names,
    which: Which,
    count: Count,
    example: object,
    torch_example: object,
    tolerance: float,
    strict: bool,
    port: Callable[[KerasPart, TorchPart, Surgery], Iterator[str]],
    finish: Callable[[Pair, int, Surgery], None],
) -> PortReport:
    refuse_wrapped(model)
    matching, refused = _matched(keras_model, model, names, which)
    counts = _counts(count, matching.pairs)
    done: list[tuple[Pair, Ported]] = []
    with Surgery() as surgery:
        for pair in matching.pairs:
            one, twin = pair
            part = surgery.part()
            try:
                notes = tuple(port(one, twin, part))
            except Refusal as reason:
                part.undo()
                refused.append((twin.path if to == "torch" else one.name, str(reason)))
            else:
                done.append((pair, Ported(one.name, twin.path, one.geometry.kind, notes)))
        if strict and refused:
            raise _refused(refused)
        _must_hold([pair for pair, _ in done])
        agreed = None
        if example is not None:
            from stillnorm.porting.agreement import agreement

            agreed = agreement(
                keras_model, model, matching.pairs, example, torch_example, tolerance
            )
            if not agreed:
                raise _differ(agreed, matching)
        for pair, _ in done:
            if (n := counts.get(pair[1].path)) is not None:
                finish(pair, n, surgery)
        return PortReport(
            to,
            tuple(ported for _, ported in done),
            tuple(refused),
            matching.by,
            matching.left,
            _variance(to, counts, sum(twin.norm is not None for (_, twin), _ in done)),
            agreed,
            to == "keras" and bool(getattr(keras_model, "compiled", False)),
            surgery,
        )


def _matched(
    keras_model: Any, model: nn.Module, names: Names, which: Which
) -> tuple[Matching, list[tuple[str, str]]]:
    """Match the layers of both models; return also what there is besides."""
    if which not in ("all", "norms"):
        raise ValueError(f"which={which!r} is not 'all' or 'norms'")
    if not type(keras_model).__module__.partition(".")[0] == "keras" and not any(
        kind.__module__.startswith("keras.src") for kind in type(keras_model).__mro__
    ):
        raise PortError(
            f"a {type(keras_model).__name__} is no model of Keras 3",
            help="from_keras(keras_model, torch_model), to_keras(torch_model, keras_model)",
        )
    from stillnorm.porting import keras_layers
    from stillnorm.porting.matching import match

    if not keras_layers.is_built(keras_model):
        raise PortError(
            f"{keras_model.name} is not built: it has no weights yet",
            help="call it once on an example, or give it an Input",
        )
    if not isinstance(model, nn.Module) or keras_layers.is_keras_model(model):
        raise PortError(
            f"a {type(model).__name__} is no torch model",
            help="from_keras(keras_model, torch_model), to_keras(torch_model, keras_model)",
        )
    theirs, their_others = keras_layers.parts_of(keras_model)
    ours, our_others = torch_parts(model)
    if which == "norms":
        theirs = [part for part in theirs if part.geometry.kind == "batch norm"]
        ours = [part for part in ours if part.norm is not None]
        their_others, our_others = [], []
    matching = match(theirs, ours, names)
    others = [] if isinstance(names, Mapping) else their_others + our_others
    return matching, others


def _counts(count: Count, pairs: Sequence[Pair]) -> dict[str, int]:
    """Return n by torch path."""
    paths = [twin.path for _, twin in pairs if twin.norm is not None]
    counts = dict(count) if isinstance(count, Mapping) else {}
    if isinstance(count, int):
        counts = dict.fromkeys(paths, count)
    for path, n in counts.items():
        if path not in paths:
            raise PortError(f"count=: {path!r} is no batch norm", help=f"it has {', '.join(paths)}")
        if n < 2:
            raise PortError(
                f"count={n}: of less than 2 values there is no unbiased variance",
                help="batch size times height times width",
            )
    return counts


def _must_hold(pairs: Sequence[Pair]) -> None:
    """Raise where a tensor did not keep its value, because another layer has it too."""
    owners: dict[int, str] = {}
    for one, twin in pairs:
        for name, tensor in twin.tensors().items():
            value = one.read(name)
            other = owners.setdefault(id(tensor), twin.path)
            if value is not None and other != twin.path:
                if not same_bits(tensor.detach().cpu(), value.to(tensor.dtype)):
                    raise StateError(
                        f"{other} and {twin.path} share their {name}, and their Keras twins do not",
                        help="untie them, or tie the Keras layers",
                    )


def _refused(refused: list[tuple[str, str]]) -> RefusedError:
    name, reason = refused[0]
    more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
    return RefusedError(
        f"{name or '(root)'} cannot be ported: {reason}{more}",
        help="nothing was changed; strict=False ports the others",
    )


def _differ(agreed: Agreement, matching: Matching) -> PortError:
    what = "; ".join(line.text for line in agreed.blocks() if isinstance(line.text, str))
    help = "the networks differ in something without weights: padding, an activation, an order"
    if matching.by == "order":
        help = "layers matched by order may have changed places: give names=; or " + help
    return PortError(f"the models differ, and nothing was changed: {what}", help=help)


def _variance(to: To, counts: dict[str, int], norms: int) -> str:
    kept = (
        "variance: kept as it is, so that eval outputs stay the same; Keras' is biased, torch's "
        "n / (n - 1) times that, and count=n converts it"
    )
    if not counts:
        return kept
    factor = "n / (n - 1)" if to == "torch" else "(n - 1) / n"
    return f"variance: times {factor} in {len(counts)} of {norms} norms, by count="
