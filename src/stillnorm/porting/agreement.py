"""Whether two models of two frameworks compute the same, and learn the same statistics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from stillnorm.errors import PortError
from stillnorm.norms import write
from stillnorm.porting.algebra import complement
from stillnorm.porting.keras.parts import KerasPart, as_torch
from stillnorm.porting.keras.running import left_as_found, random_layer, run
from stillnorm.porting.matching import Pair
from stillnorm.porting.report import Agreement, StatisticsError
from stillnorm.porting.torch_layers import TorchPart
from stillnorm.state import eval_mode, preserved
from stillnorm.tracing import call_example, eager, tensors_in

Moments = tuple[Tensor, Tensor]


def agreement(
    keras_model: Any,
    model: nn.Module,
    pairs: Sequence[Pair],
    example: object,
    torch_example: object,
    tolerance: float,
) -> Agreement:
    """Run both models on one example, in eval mode and one forward in train mode.

    Both are left as they were. See `stillnorm.porting.compare` for the arguments.
    """
    last = any(_is_channels_last(part) for part, _ in pairs)
    place = next((p.device for p in model.parameters()), torch.device("cpu"))

    def given() -> Any:
        if torch_example is not None:
            return _each(torch_example, lambda value: as_torch(value).to(place))
        return _each(example, lambda value: _moved(as_torch(value), last).to(place))

    with left_as_found(keras_model), preserved(model), torch.no_grad(), eager():
        with eval_mode(model):
            ours = list(tensors_in(call_example(model, given())))
        error, largest = _outputs(run(keras_model, example, training=False), ours, last)
        rows: tuple[StatisticsError, ...] = ()
        reason = _random(keras_model, model)
        norms = [pair for pair in pairs if pair[1].norm is not None]
        if reason is None and norms:
            for pair in norms:
                _start_from_zero(*pair)
            before = [(_moments(one.read), _moments(twin.tensors().get)) for one, twin in norms]
            with _counted(norms) as counts:
                reason = _step(keras_model, model, example, given())
            if reason is None:
                rows = tuple(
                    _row(one, twin, *was, counts[twin.module])
                    for (one, twin), was in zip(norms, before, strict=True)
                )
    settings = tuple((twin.path, what) for one, twin in norms for what in _settings(one, twin))
    return Agreement(error, largest, tolerance, settings, rows, reason or "")


def _settings(one: KerasPart, twin: TorchPart) -> Iterator[str]:
    """Yield what a norm is set to on one side and not on the other."""
    norm, layer = twin.norm, one.layer
    if norm is None:
        return
    held = norm.hold is not None or norm.family == "frozen"
    theirs: dict[str, object] = {"eps": layer.epsilon, "frozen": not layer.trainable}
    ours: dict[str, object] = {"eps": norm.eps, "frozen": held}
    if not held:
        theirs["momentum"], ours["momentum"] = complement(layer.momentum), norm.momentum
    for name, value in ours.items():
        if value != theirs[name]:
            yield f"{name} is {value} in torch, {theirs[name]} in Keras"


# ------------------------------------------------------------------------------- outputs


def _outputs(theirs: list[Tensor], ours: list[Tensor], last: bool) -> tuple[float, float]:
    """Return the largest difference of the outputs, and the largest output."""
    if len(theirs) != len(ours):
        raise PortError(
            f"the Keras model gives {len(theirs)} outputs, the torch model {len(ours)}",
            help="models that compute the same give the same outputs, in the same order",
        )
    error = largest = 0.0
    for a, b in zip(theirs, ours, strict=True):
        moved = _moved(a, last)
        a = moved if moved.shape == b.shape else a
        if a.shape != b.shape:
            raise PortError(
                f"an output is {tuple(a.shape)} in Keras and {tuple(b.shape)} in torch",
                help="the same network has outputs of the same shape, but for the channel axis",
            )
        error = max(error, _largest(a.double() - b.detach().cpu().double()))
        largest = max(largest, _largest(a))
    return error, largest


def _largest(values: Tensor) -> float:
    """Return the largest magnitude; infinity where there is NaN."""
    largest = values.abs().max().item() if values.numel() else 0.0
    return largest if largest == largest else float("inf")


# ------------------------------------------------------------------------------- one step


def _random(keras_model: Any, model: nn.Module) -> str | None:
    """Say what makes a forward in train mode random, past the dropouts, which are switched off."""
    if (layer := random_layer(keras_model)) is not None:
        return f"{layer}, is random in train mode"
    if any(isinstance(module, nn.RReLU) for module in model.modules()):
        return "an RReLU in torch is random in train mode"
    return None


def _step(keras_model: Any, model: nn.Module, example: object, given: object) -> str | None:
    """Run both models in train mode, nothing dropped; return why that cannot be done."""
    model.train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    try:
        call_example(model, given)
    except ValueError as error:  # one value in each channel
        return f"in train mode the torch model does not take the example: {error}"
    run(keras_model, example, training=True)
    return None


def _start_from_zero(one: KerasPart, twin: TorchPart) -> None:
    """Let the statistics of a pair that learns be what one batch adds, and nothing besides."""
    norm = twin.norm
    if norm is not None and one.layer.trainable and norm.updates_statistics(training=True):
        for name in _STATISTICS:
            zeros = torch.zeros(one.geometry.weight)
            one.write(name, zeros)
            write(twin.tensors()[name], zeros)


@contextmanager
def _counted(norms: Sequence[Pair]) -> Iterator[dict[nn.Module, list[int]]]:
    """Count the values in each channel of what the norms receive, per call."""
    counts: dict[nn.Module, list[int]] = defaultdict(list)

    def count(module: nn.Module, args: Any, output: object) -> None:
        for x in tensors_in(args):
            counts[module].append(x.numel() // x.shape[1])
            break

    handles = [twin.module.register_forward_hook(count) for _, twin in norms]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _row(
    one: KerasPart, twin: TorchPart, there: Moments, here: Moments, calls: list[int]
) -> StatisticsError:
    """Compare what the statistics are now with what Keras made of its own."""
    mean, var = _moments(twin.tensors().get)
    mean_there, var_there = _moments(one.read)
    if not one.layer.trainable or not calls:
        n = None
        expected_mean, expected_var = here
    else:
        n = min(calls)
        kept = (1 - complement(one.layer.momentum)) ** len(calls)
        expected_mean = kept * here[0] + (mean_there - kept * there[0])
        expected_var = kept * here[1] + n / max(n - 1, 1) * (var_there - kept * there[1])
    largest = _largest(expected_var)
    return StatisticsError(
        twin.path,
        one.name,
        n,
        _largest(mean - expected_mean) / (max(_largest(expected_mean), largest**0.5) or 1.0),
        _largest(var - expected_var) / (largest or 1.0),
    )


def _moments(get: Any) -> Moments:
    """Return copies of mean and variance in float64."""
    mean, var = (get(name).detach().cpu().double().clone() for name in _STATISTICS)
    return mean, var


_STATISTICS = ("running_mean", "running_var")


# ------------------------------------------------------------------------------- inputs


def _is_channels_last(part: KerasPart) -> bool:
    layer = part.layer
    if part.geometry.kind != "batch norm":
        return getattr(layer, "data_format", None) == "channels_last"
    rank = layer.input_spec.ndim
    return bool(rank > 2 and layer.axis % rank == rank - 1)


def _moved(value: Tensor, last: bool) -> Tensor:
    """Move the channels of a map to axis 1."""
    is_map = last and value.ndim > 2 and value.is_floating_point()
    return value.movedim(-1, 1).contiguous() if is_map else value


def _each(example: object, change: Any) -> Any:
    """Change every input: alone, in a tuple or list, or by name."""
    if isinstance(example, Mapping):
        return {key: change(value) for key, value in example.items()}
    if isinstance(example, tuple | list):
        return tuple(map(change, example))
    return change(example)
