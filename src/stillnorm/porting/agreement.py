"""Whether two models of two frameworks compute the same, and learn the same statistics."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import torch
from keras import layers
from torch import Tensor, nn

from stillnorm.errors import PortError
from stillnorm.porting.algebra import complement
from stillnorm.porting.keras_layers import KerasPart, all_layers, assign, read
from stillnorm.porting.matching import Pair
from stillnorm.porting.report import Agreement, StatisticsError
from stillnorm.state import eval_mode, preserved
from stillnorm.tracing import call_example, eager, tensors_in

_DROPOUT = (layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D)
_DROPOUT += (layers.SpatialDropout3D, layers.GaussianDropout, layers.AlphaDropout)


def agreement(
    keras_model: Any,
    model: nn.Module,
    pairs: Sequence[Pair],
    example: object,
    torch_example: object,
    tolerance: float,
) -> Agreement:
    """Run both models on one example, in eval mode and one forward in train mode.

    Both are left as they were. See `stillnorm.port.compare` for the arguments.
    """
    last = any(map(_is_channels_last, (part for part, _ in pairs)))
    taken = _each(example, _to_keras)
    given = torch_example
    if given is None:
        place = next((p.device for p in model.parameters()), torch.device("cpu"))
        given = _each(example, lambda value: _to_torch(value, last).to(place))
    with _kept(keras_model), preserved(model), torch.no_grad(), eager():
        with eval_mode(model):
            ours = list(tensors_in(call_example(model, given)))
        theirs = [_tensor(y) for y in keras.tree.flatten(keras_model(taken, training=False))]
        error, largest = _outputs(theirs, ours, last)
        reason = _undecided(keras_model, model)
        rows: tuple[StatisticsError, ...] = ()
        if reason is None:
            rows, reason = _train_once(keras_model, model, pairs, taken, given)
    return Agreement(error, largest, tolerance, rows, reason or "")


def _outputs(theirs: list[Tensor], ours: list[Tensor], last: bool) -> tuple[float, float]:
    """Return the largest difference of the outputs, and the largest output."""
    if len(theirs) != len(ours):
        raise PortError(
            f"the Keras model gives {len(theirs)} outputs, the torch model {len(ours)}",
            help="models that compute the same give the same outputs, in the same order",
        )
    error = largest = 0.0
    for theirs_one, ours_one in zip(theirs, ours, strict=True):
        a, b = theirs_one.double(), ours_one.detach().cpu().double()
        moved = a.movedim(-1, 1) if last and a.ndim > 2 else a
        a = moved if moved.shape == b.shape else a
        if a.shape != b.shape:
            raise PortError(
                f"an output is {tuple(theirs_one.shape)} in Keras and {tuple(b.shape)} in torch",
                help="models that compute the same give the same shapes, but for where the "
                "channels are",
            )
        difference = (a - b).abs().max().item() if a.numel() else 0.0
        error = max(error, difference if difference == difference else float("inf"))
        largest = max(largest, a.abs().max().item() if a.numel() else 0.0)
    return error, largest


# ------------------------------------------------------------------------------- one step


def _train_once(
    keras_model: Any, model: nn.Module, pairs: Sequence[Pair], taken: Any, given: object
) -> tuple[tuple[StatisticsError, ...], str | None]:
    """Run one forward in train mode and compare the statistics; return them, or why not."""
    norms = [(part, twin) for part, twin in pairs if twin.norm is not None]
    before = {id(part): _statistics(part) for part, _ in norms}
    ours = {id(part): _running(twin.tensors()) for part, twin in norms}
    counts: dict[nn.Module, list[int]] = defaultdict(list)

    def count(module: nn.Module, args: Any, *_: Any) -> None:
        x = next(tensors_in(args), None)
        if x is not None and x.ndim > 1:
            counts[module].append(x.numel() // x.shape[1])

    for _, twin in norms:
        twin.module.register_forward_hook(count)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    try:
        call_example(model, given)
        keras_model(taken, training=True)
    except ValueError as error:
        return (), f"in train mode the example is not taken: {str(error).splitlines()[0]}"
    rows = []
    for part, twin in norms:
        calls = counts[twin.module]
        if len(set(calls)) > 1:
            continue  # maps of several sizes: the statistics tell no one correction
        mean, var = _running(twin.tensors())
        was = ours[id(part)]
        after = _statistics(part)
        if not part.layer.trainable or not calls:
            expected = was
            n = None
        else:
            n = calls[0]
            kept = (1 - complement(part.layer.momentum)) ** len(calls)
            start = before[id(part)]
            bessel = n / max(n - 1, 1)
            expected = (
                kept * was[0] + (after[0] - kept * start[0]),
                kept * was[1] + bessel * (after[1] - kept * start[1]),
            )
        scale = expected[1].abs().max().item()
        rows.append(
            StatisticsError(
                twin.path,
                part.name,
                n,
                _relative(mean, expected[0], max(expected[0].abs().max().item(), scale**0.5)),
                _relative(var, expected[1], scale),
            )
        )
    return tuple(rows), None


def _relative(a: Tensor, b: Tensor, scale: float) -> float:
    error = (a - b).abs().max().item() / (scale or 1.0)
    return error if error == error else float("inf")


def _statistics(part: KerasPart) -> tuple[Tensor, Tensor]:
    mean, var = part.read("running_mean"), part.read("running_var")
    if mean is None or var is None:
        raise PortError(f"{part.name} has no moving statistics", help="build the model first")
    return mean.double(), var.double()


def _running(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    mean, var = (
        tensors[name].detach().cpu().double().clone() for name in ("running_mean", "running_var")
    )
    return mean, var


def _undecided(keras_model: Any, model: nn.Module) -> str | None:
    """Name what makes a train mode forward random, past the dropouts that are switched off."""
    noisy = (layers.GaussianNoise,)
    for name, layer in all_layers(keras_model):
        random = hasattr(layer, "seed_generator") and not isinstance(layer, _DROPOUT)
        if isinstance(layer, noisy) or random:
            return f"{name} ({type(layer).__name__}) is random in train mode"
    if any(isinstance(module, nn.RReLU) for module in model.modules()):
        return "the torch model has an RReLU, which is random in train mode"
    return None


@contextlib.contextmanager
def _kept(keras_model: Any) -> Iterator[None]:
    """Put back every variable of a Keras model that the block writes, and let nothing drop out."""
    variables = list(keras_model.variables)
    before = [read(variable) for variable in variables]
    rates = [(x, x.rate) for _, x in all_layers(keras_model) if isinstance(x, _DROPOUT)]
    try:
        for layer, _ in rates:
            layer.rate = 0
        yield
    finally:
        for layer, rate in rates:
            layer.rate = rate
        for variable, value in zip(variables, before, strict=True):
            if not torch.equal(read(variable), value):
                assign(variable, value)


# ------------------------------------------------------------------------------- inputs


def _is_channels_last(part: KerasPart) -> bool:
    layer = part.layer
    if part.geometry.kind == "batch norm":
        rank = layer.input_spec.ndim
        return bool(rank > 2 and layer.axis % rank == rank - 1)
    return getattr(layer, "data_format", None) == "channels_last"


def _each(example: object, change: Any) -> Any:
    """Change every input: alone, in a list or tuple, or by name."""
    if isinstance(example, Mapping):
        return {key: change(value) for key, value in example.items()}
    if isinstance(example, tuple | list):
        return tuple(change(value) for value in example)
    return change(example)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    return torch.tensor(keras.ops.convert_to_numpy(value))


def _to_keras(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.detach().cpu().numpy()
    return keras.ops.convert_to_tensor(value)


def _to_torch(value: Any, last: bool) -> Tensor:
    tensor = _tensor(value)
    moved = last and tensor.ndim > 2 and tensor.is_floating_point()
    return tensor.movedim(-1, 1).contiguous() if moved else tensor
