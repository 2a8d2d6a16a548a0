"""The verbs: `from_keras`, `to_keras`, `compare`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from stillnorm.errors import PortError
from stillnorm.porting.part import Refusal
from stillnorm.porting.report import Agreement, PortReport
from stillnorm.porting.transfer import Check, Count, Direction, Which, matched, transfer
from stillnorm.repair.surgery import Surgery

if TYPE_CHECKING:
    from stillnorm.porting.matching import Names, Pair


def from_keras(
    keras_model: Any,
    model: nn.Module,
    *,
    names: Names = None,
    which: Which = "all",
    count: Count = None,
    example: object = None,
    torch_example: object = None,
    tolerance: float | None = None,
    strict: bool = True,
) -> PortReport:
    r"""Give a torch model the weights of a Keras 3 model, and its norms what they do there.

    Both models exist and are the same network. Ported are batch norms, convolutions (depthwise,
    separable and transposed ones too) and dense layers: kernels in torch's layout, after a
    `Flatten` in torch's order of features, (C, height, width). Of batch norms also what no file of
    weights has:

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
        torch_example: The same input as the torch model takes it, where that is not the example in
            the model's dtype, with its channels moved to axis 1.
        tolerance: How much an output may differ, relative to its largest value. None for what
            rounding explains: ten times what that of the torch model is off a copy of it in
            float64, and 8e-6 at least; 1e-3 where it does not run so. See
            `stillnorm.porting.rounding`.
        strict: Raise where a layer with weights cannot be ported; otherwise it is left alone and
            reported.

    Returns:
        What was ported, with notes; what was refused, and why; how well the models agree;
        `undo()`.

    Raises:
        PortError: The models cannot be matched layer by layer, do not take the example, or do not
            agree on it; or the example proves nothing: it, or all that comes of it, is one number,
            or not finite.
        RefusedError: `strict`, and a layer cannot be ported.
        StateError: The torch model is wrapped for distributed training; or two of its layers share
            memory and would have to hold different values.

    Mutates:
        The torch model: values in place; eps, momentum, class (held) and `requires_grad` of batch
        norms. All of it or, if anything is raised, nothing.

    Cost:
        Two copies of the weights; with an example, two forwards of either model, and of a copy of
        the torch model in float64 unless a tolerance is given.

    Example:
        >>> import keras, torch
        >>> there = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> here = nn.BatchNorm1d(4)
        >>> report = from_keras(there, here, example=torch.randn(8, 4))
        >>> here.eps, here.momentum, bool(report.agreement)
        (0.001, 0.01, True)

    Source: keras/src/layers/normalization/batch_normalization.py of Keras 3.15;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm2d.html
    """
    check = Check(example, torch_example, tolerance)
    return transfer(keras_model, model, _TO_TORCH, names, which, count, check, strict)


def to_keras(
    model: nn.Module,
    keras_model: Any,
    *,
    names: Names = None,
    which: Which = "all",
    count: Count = None,
    example: object = None,
    torch_example: object = None,
    tolerance: float | None = None,
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
        tolerance: How much an output may differ; None for what rounding explains.
        strict: Raise where a layer with weights cannot be ported.

    Returns:
        What was ported, with notes; what was refused, and why; how well the models agree;
        `undo()`.

    Raises:
        PortError: The models cannot be matched layer by layer, do not take the example, or do not
            agree on it; or the example proves nothing: it, or all that comes of it, is one number,
            or not finite.
        RefusedError: `strict`, and a layer cannot be ported.
        StateError: The torch model is wrapped for distributed training; or two layers of the Keras
            model share a variable and would have to hold different values.

    Mutates:
        The Keras model: its variables; epsilon, momentum and `trainable` of batch norms. All of it
        or, if anything is raised, nothing.

    Cost:
        As `from_keras`.

    Example:
        >>> import keras
        >>> there = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> _ = to_keras(nn.BatchNorm1d(4), there)
        >>> there.layers[0].epsilon, there.layers[0].momentum
        (1e-05, 0.9)
    """
    check = Check(example, torch_example, tolerance)
    return transfer(keras_model, model, _TO_KERAS, names, which, count, check, strict)


def compare(
    keras_model: Any,
    model: nn.Module,
    example: object,
    *,
    names: Names = None,
    torch_example: object = None,
    tolerance: float | None = None,
) -> Agreement:
    r"""Compare what a Keras and a torch model compute, and learn in a step, from the same input.

    In eval mode their outputs are compared. Then each is run once in train mode, dropout switched
    off and the running statistics at zero, so that they are what the one batch adds: the means as
    they are, and of the variances what Keras adds, of a biased variance of n values, times
    n / (n - 1), which is what torch adds. With v and t the running variances of Keras and torch
    after it:

    .. math:: t = \frac{n}{n - 1} v

    Args:
        keras_model: The Keras model.
        model: The torch model.
        example: An input of the Keras model; see `from_keras`, as of the others.
        names: Which layer is which.
        torch_example: The same input as the torch model takes it.
        tolerance: How much an output may differ, relative to its largest value; statistics,
            relative to the largest of the layer. None for what rounding explains, see `from_keras`;
            of statistics 1e-3 at least.

    Returns:
        The differences; true where they are within the tolerance. Both models are left as found.

    Raises:
        PortError: The models cannot be matched layer by layer, do not take the example, or give
            outputs of other shapes; or the example proves nothing: see `from_keras`.

    Cost:
        Two forwards of either model, and of a copy of the torch model in float64 unless a tolerance
        is given; a copy of all variables.

    Example:
        >>> import keras, torch
        >>> there = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> here = nn.BatchNorm1d(4, eps=1e-3, momentum=0.01)
        >>> bool(compare(there, here, torch.randn(8, 4)))
        True
        >>> here.momentum = 0.99  # Keras', copied
        >>> bool(compare(there, here, torch.randn(8, 4)))
        False
    """
    matching, *_ = matched(keras_model, model, names, "all")
    return Check(example, torch_example, tolerance).run(keras_model, model, matching.pairs)


def read_keras(path: str | os.PathLike[str]) -> Any:
    """Read a model from a file of Keras 3, ``.keras``; no code in it is run.

    Where Keras has not been imported, its backend becomes torch, unless the environment variable
    KERAS_BACKEND says otherwise.

    Args:
        path: What ``model.save("model.keras")`` has written.

    Returns:
        The Keras model, not compiled.

    Raises:
        FileFormatError: It is no such file, is damaged, has code in it (a `Lambda` layer, or one of
            your own), or would grow a hundredfold unpacked.
        PortError: Keras is not installed.

    Example:
        >>> import keras, tempfile
        >>> there = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     there.save(f"{folder}/model.keras")
        ...     read_keras(f"{folder}/model.keras").count_params()
        16
    """
    os.environ.setdefault("KERAS_BACKEND", "torch")
    try:
        from stillnorm.porting.keras.files import load
    except ImportError as error:
        raise PortError(
            f"Keras cannot be imported: {error}", help="pip install 'stillnorm[keras]'"
        ) from error
    return load(Path(path))


# ------------------------------------------------------------------------------- directions


def _to_torch(pair: Pair, surgery: Surgery) -> Iterator[str]:
    from stillnorm.porting.semantics import to_torch

    one, twin = pair
    if twin.norm is not None:
        yield from to_torch(one, twin.norm, surgery)
        return
    for name, tensor in twin.tensors().items():
        if (value := one.read(name)) is not None:
            if tensor.is_meta:
                raise Refusal("is on the meta device in torch")
            surgery.write(tensor, value)


def _unbias(pair: Pair, n: int, surgery: Surgery) -> None:
    from stillnorm.porting.algebra import unbiased

    one, twin = pair
    if (variance := one.read("running_var")) is not None:  # not from torch: two norms may share it
        surgery.write(twin.tensors()["running_var"], unbiased(variance, n))


def _to_keras(pair: Pair, surgery: Surgery) -> Iterator[str]:
    from stillnorm.porting.semantics import to_keras, write_keras

    one, twin = pair
    if twin.norm is not None:
        yield from to_keras(one, twin.norm, surgery)
        return
    for name, tensor in twin.tensors().items():
        if tensor.is_meta:
            raise Refusal("is on the meta device in torch")
        write_keras(surgery, one, name, tensor)


def _bias(pair: Pair, n: int, surgery: Surgery) -> None:
    from stillnorm.porting.algebra import biased
    from stillnorm.porting.semantics import write_keras

    one, twin = pair
    write_keras(surgery, one, "running_var", biased(twin.tensors()["running_var"].detach(), n))


_TO_TORCH = Direction("torch", _to_torch, _unbias)
_TO_KERAS = Direction("keras", _to_keras, _bias)
