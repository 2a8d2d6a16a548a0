"""Whether two models of two frameworks compute the same, and learn the same statistics."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from stillnorm.errors import PortError
from stillnorm.norms import write
from stillnorm.norms.adapters.keras import complement
from stillnorm.porting.keras.parts import KerasPart, as_torch
from stillnorm.porting.keras.running import cause, left_as_found, random_layer, run
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
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if like.is_meta:
        raise PortError("the torch model is on the meta device", help="give it values first")

    def given() -> Any:
        if torch_example is not None:
            return _each(torch_example, lambda value: as_torch(value).to(like.device))
        return _each(example, lambda value: _as_input(_moved(as_torch(value), last), like))

    with left_as_found(keras_model), preserved(model), torch.no_grad(), eager():
        with _taken("Keras", "example= is what the Keras model takes: an array, or several"):
            theirs = run(keras_model, example, training=False)
        with eval_mode(model), _taken("torch", "torch_example= is the input as torch takes it"):
            ours = call_example(model, given())
        error, largest = _outputs(*_flat(theirs, ours), last)
        rows: tuple[StatisticsError, ...] = ()
        reason = f"{layer}, is random in train mode" if (layer := random_layer(keras_model)) else ""
        norms = [pair for pair in pairs if pair[1].norm is not None]
        kept = [pair for pair in norms if "running_mean" in pair[1].tensors()]
        if kept and not reason:
            for pair in kept:
                _start_from_zero(*pair)
            before = [(_moments(one.read), _moments(twin.tensors().get)) for one, twin in kept]
            with _counted(kept) as counts:
                reason = _step(keras_model, model, example, given())
            if not reason:
                rows = tuple(
                    _row(one, twin, *was, counts[twin.module])
                    for (one, twin), was in zip(kept, before, strict=True)
                )
    settings = tuple((twin.path, what) for one, twin in norms for what in _settings(one, twin))
    return Agreement(error, largest, tolerance, settings, rows, reason)


def _settings(one: KerasPart, twin: TorchPart) -> Iterator[str]:
    """Yield what a norm is set to on one side and not on the other."""
    norm, layer = twin.norm, one.layer
    if norm is None:
        return
    if not norm.has_statistics:
        yield "has no running statistics in torch"
        return
    held = norm.hold is not None or norm.family == "frozen"
    theirs: dict[str, float] = {"eps": layer.epsilon, "frozen": not one.updates}
    ours: dict[str, float | None] = {"eps": norm.eps, "frozen": held}
    if not held:
        theirs["momentum"], ours["momentum"] = complement(layer.momentum), norm.momentum
    if not held and one.updates:
        for name in ("weight", "bias"):
            stored, tensor = one.stored.get(name), twin.tensors().get(name)
            if stored is not None and tensor is not None:
                theirs[f"requires_grad of {name}"] = stored.variable.trainable
                ours[f"requires_grad of {name}"] = tensor.requires_grad
    for name, value in ours.items():
        if value is None or not math.isclose(value, theirs[name], rel_tol=1e-9, abs_tol=1e-15):
            yield f"{name} is {value} in torch, {theirs[name]} in Keras"


# ------------------------------------------------------------------------------- outputs


@contextmanager
def _taken(side: str, help: str) -> Iterator[None]:
    """Say which model does not take the example, whatever it raises."""
    try:
        yield
    except Exception as error:
        raise PortError(
            f"the {side} model does not take the example: {cause(error)}", help=help
        ) from error


def _flat(theirs: Any, ours: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs of both, in one order where they have names."""
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping) and theirs.keys() == ours.keys():
        ours = [ours[name] for name in theirs]
    return list(tensors_in(theirs)), list(tensors_in(ours))


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


def _step(keras_model: Any, model: nn.Module, example: object, given: object) -> str:
    """Run both models in train mode, nothing dropped; return why that says nothing."""
    model.train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    before = _random_state()
    try:
        call_example(model, given)
    except (ValueError, RuntimeError) as error:  # one value in each channel; inference tensors
        return f"in train mode the torch model does not take the example: {error}"
    if not all(map(torch.equal, before, _random_state())):  # a functional dropout, a dropped path
        return "the torch model is random in train mode, dropout layers off"
    run(keras_model, example, training=True)
    return ""


def _random_state() -> list[Tensor]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [torch.get_rng_state(), *cuda]


def _start_from_zero(one: KerasPart, twin: TorchPart) -> None:
    """Let the statistics of a pair that learns be what one batch adds, and nothing besides."""
    norm = twin.norm
    if norm is not None and one.updates and norm.updates_statistics(training=True):
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
    if not one.updates or not calls:
        n = None
        expected_mean, expected_var = here
    else:
        n, most = min(calls), max(calls)
        kept = (1 - complement(one.layer.momentum)) ** len(calls)
        expected_mean = kept * here[0] + (mean_there - kept * there[0])
        added = var_there - kept * there[1]
        # Several calls may have several n: the variance is between what they would make of it.
        bounds = [kept * here[1] + added * (k / max(k - 1, 1)) for k in (most, n)]
        expected_var = var.clamp(*bounds)
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


def _as_input(value: Tensor, like: Tensor) -> Tensor:
    """Give an input the device of the parameters, and their dtype, as Keras does."""
    return value.to(like if value.is_floating_point() else like.device)


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
