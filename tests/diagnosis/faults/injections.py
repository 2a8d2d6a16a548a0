"""The faults, each as it comes about, put into a healthy model of any architecture.

What a function returns is the model, the layers that the finding has to name, and what `check` gets
to see it.
"""

from __future__ import annotations

import copy
import warnings
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from diagnosis import steps
from diagnosis.faults.grid import Case, Subject
from diagnosis.faults.parts import (
    Captions,
    Ending,
    FrozenBatchNorm2d,
    Hidden,
    Leaking,
    stubborn,
    with_activation,
)
from stillnorm import freeze
from stillnorm.norms import NormLayer

# --------------------------------------------------------------------------- modes and freezing


def frozen_parameters(it: Subject) -> Case:
    """Freeze everything up to the victim by requires_grad."""
    frozen = freeze_parameters_up_to(it)
    return Case(it.model, frozen)


def frozen_parameters_with_data(it: Subject) -> Case:
    frozen = freeze_parameters_up_to(it)
    return it.case(*frozen)


def freeze_parameters_up_to(it: Subject) -> tuple[str, ...]:
    """Freeze the first parameters of the model, the last of them the victim's."""
    last = it.victim
    for module in it.model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if module is last.module:
            return it.paths[: it.paths.index(last.path) + 1]
    raise AssertionError


def zero_momentum(it: Subject) -> Case:
    it.victim.module.momentum = 0
    return it.case(it.victim.path)


def single_eval(it: Subject) -> Case:
    it.model.train()
    it.victim.module.eval()
    return it.case(it.victim.path)


def frozen_identity(it: Subject) -> Case:
    it.victim.module.reset_running_stats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        freeze(it.model, it.victim.path)
    return it.case(it.victim.path)


def inference_in_train_mode(it: Subject) -> Case:
    it.model.train()
    return it.case(*it.in_order, predict=no_grad(it))


def one_layer_left_in_train_mode(it: Subject) -> Case:
    it.victim.module.train()
    return it.case(it.victim.path, predict=no_grad(it))


def no_grad(it: Subject) -> Any:
    forward = it.call

    def predict(model: nn.Module, batch: Tensor) -> Any:
        with torch.no_grad():
            return forward(model, batch)

    return predict


def train_without_return(it: Subject) -> Case:
    """A norm of one's own whose `train()` does not pass the mode on."""
    stubborn(it.victim.module.train())
    return it.case(it.victim.path)


def kept_in_a_list(it: Subject) -> Case:
    """A norm in a plain list, which `eval()` does not know of."""
    path = it.victim.path
    it.put(path, Hidden(it.victim.module.train()))
    return it.case(path)


def toggled_tracking(it: Subject) -> Case:
    it.victim.module.track_running_stats = False
    return it.case(it.victim.path)


# --------------------------------------------------------------------------- statistics


def lost_statistics(it: Subject) -> Case:
    it.victim.module.reset_running_stats()
    return Case(it.model, (it.victim.path,))


def lost_statistics_with_data(it: Subject) -> Case:
    it.victim.module.reset_running_stats()
    return it.case(it.victim.path)


def not_a_number(it: Subject) -> Case:
    it.victim.module.running_var[1] = torch.nan
    return it.case(it.victim.path)


def negative_variance(it: Subject) -> Case:
    it.victim.module.running_var[1] = -0.5
    return it.case(it.victim.path)


def dead_channel(it: Subject) -> Case:
    """A channel that was constant while its statistics were taken."""
    layer = widest_in_variance(it)
    with torch.no_grad():
        layer.module.running_var[0] = 0
        layer.module.weight[0] = 2
    return Case(it.model, (layer.path,))


def moved_mean(it: Subject) -> Case:
    module = it.victim.module
    module.running_mean += module.running_var.sqrt()
    return it.case(it.victim.path)


def tripled_variance(it: Subject) -> Case:
    it.victim.module.running_var *= 3
    return it.case(it.victim.path)


def untracked(it: Subject) -> Case:
    untrack(it.victim.module)
    return Case(it.model, (it.victim.path,))


def untracked_with_data(it: Subject) -> Case:
    untrack(it.victim.module)
    return it.case(it.victim.path)


def untrack(module: nn.Module) -> None:
    module.track_running_stats = False
    module.running_mean = module.running_var = module.num_batches_tracked = None


def keras_momentum(it: Subject) -> Case:
    it.victim.module.momentum = 0.99
    return it.case(it.victim.path)


def cumulative_momentum(it: Subject) -> Case:
    it.victim.module.momentum = None
    return it.case(it.victim.path, select=("DEFAULT", "SN109"))


def a_deviation_for_a_variance(it: Subject) -> Case:
    layer = unlike_in_variance(it)
    layer.module.running_var.sqrt_()
    return it.case(layer.path)


def inverse_deviations_in_all_layers(it: Subject) -> Case:
    for layer in it.layers:
        layer.module.running_var.add_(layer.eps).rsqrt_()
    return it.case(*it.in_order)


def few_updates_of_all_layers(it: Subject) -> Case:
    """As a short training leaves them."""
    for layer in it.layers:
        layer.module.reset_running_stats()
    it.model.train()
    for x in it.batches(64, seed=2)[:3]:
        it.call(it.model, x)
    it.model.eval()
    return it.case(*it.in_order)


def an_inverse_for_a_variance(it: Subject) -> Case:
    layer = unlike_in_variance(it)
    layer.module.running_var.add_(layer.eps).reciprocal_()
    return it.case(layer.path, batches=it.batches(64))


def all_variances_times_ten(it: Subject) -> Case:
    for layer in it.layers:
        layer.module.running_var *= 10
    return it.case(*it.in_order)


def no_eps(it: Subject) -> Case:
    it.victim.module.eps = 0.0
    return Case(it.model, (it.victim.path,))


def large_eps(it: Subject) -> Case:
    """The network was made with it, and a port to torch's own eps would differ."""
    it.victim.module.eps = 2 * float(it.victim.running_var.max())
    it.recalibrate()
    return it.case(it.victim.path)


def on_the_meta_device(it: Subject) -> Case:
    for name in ("running_mean", "running_var"):
        setattr(it.victim.module, name, getattr(it.victim.module, name).to("meta"))
    return Case(it.model, (it.victim.path,))


def empty_memory(it: Subject) -> Case:
    """What `torch.empty` mostly gives."""
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        getattr(it.victim.module, name).zero_()
    return it.case(it.victim.path)


def made_under_inference_mode(it: Subject) -> Case:
    with torch.inference_mode():
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            setattr(it.victim.module, name, getattr(it.victim.module, name).clone())
    return it.case(it.victim.path)


def few_updates(it: Subject) -> Case:
    """Three updates at momentum 0.1 leave 73 % of the initial values."""
    layer = unlike_in_variance(it)
    left = 0.9**3
    layer.module.running_mean *= 1 - left
    layer.module.running_var.mul_(1 - left).add_(left)
    layer.module.num_batches_tracked.fill_(3)
    return it.case(layer.path)


def half_precision_statistics(it: Subject) -> Case:
    it.model.train()
    for name in ("running_mean", "running_var"):
        setattr(it.victim.module, name, getattr(it.victim.module, name).half())
    return Case(it.model, (it.victim.path,))


def in_bfloat16(it: Subject) -> Case:
    it.model.bfloat16().train()
    return Case(it.model, it.paths)


def widest_in_variance(it: Subject) -> NormLayer:
    """Return the layer whose channels differ most in variance."""
    return max(it.layers, key=lambda x: float(x.running_var.log().std()))


def unlike_in_variance(it: Subject) -> NormLayer:
    """Give the channels before a norm scales of their own, as training does; return the norm."""
    conv, layer = convolution_and_norm(it)
    scale = torch.randn(layer.num_features).mul(1.5).exp()
    with torch.no_grad():
        conv.weight *= scale.view(-1, *[1] * (conv.weight.dim() - 1))
    layer.module.running_mean *= scale
    layer.module.running_var *= scale.square()
    return layer


# --------------------------------------------------------------------------- structure


def unused(it: Subject) -> Case:
    it.model.spare = nn.BatchNorm2d(5)
    return it.case("spare")


def shared(it: Subject) -> Case:
    """Use one norm in place of another of the same size as well."""
    first, other = alike(it)
    it.put(other.path, first.module)
    it.recalibrate()
    return it.case(first.path)


def aliased_buffers(it: Subject) -> Case:
    first, other = alike(it)
    other.module.running_mean = first.module.running_mean
    other.module.running_var = first.module.running_var
    return it.case(first.path, other.path)


def two_names(it: Subject) -> Case:
    it.model.again = it.victim.module
    return it.case(it.victim.path)


def alike(it: Subject) -> tuple[NormLayer, NormLayer]:
    """Return the first two layers of one class, size and activation."""
    return next(
        (a, b)
        for a, b in combinations(it.layers, 2)
        if type(a.module) is type(b.module)
        and a.num_features == b.num_features
        and str(a.module) == str(b.module)
    )


def norm_at_the_end(it: Subject) -> Case:
    return ended(it, nn.BatchNorm1d(classes(it)), size=16)


def two_samples(it: Subject) -> Case:
    n = classes(it)
    return ended(it, nn.BatchNorm1d(n), nn.Linear(n, 4), size=2)


def small_batches(it: Subject) -> Case:
    n = classes(it)
    return ended(it, nn.BatchNorm1d(n), nn.Linear(n, 4), size=4)


def ended(it: Subject, *layers: nn.Module, size: int) -> Case:
    """Put layers behind the model, the first of them a norm."""
    it.model, it.forward = Ending(it.model, it.call, *layers), None
    it.recalibrate()
    return it.case("ending.0", batches=it.batches(32, size))


def classes(it: Subject) -> int:
    with torch.no_grad():
        return int(it.call(it.model, it.batches()[0][:2]).shape[1])


def bias_before_the_norm(it: Subject) -> Case:
    """Give the convolution before a norm a bias, and the norm's mean the same."""
    conv, layer = convolution_and_norm(it)
    conv.bias = nn.Parameter(0.1 * torch.randn(layer.num_features))
    layer.module.running_mean += conv.bias.detach()
    return it.case(layer.path)


def large_offset(it: Subject) -> Case:
    """The same, of ten thousand deviations."""
    conv, layer = convolution_and_norm(it)
    conv.bias = nn.Parameter(1e4 * layer.running_var.sqrt())
    layer.module.running_mean += conv.bias.detach()
    return it.case(layer.path)


def overflowing_weights(it: Subject) -> Case:
    """A convolution whose outputs are beyond the range of their type."""
    conv, layer = convolution_and_norm(it)
    with torch.no_grad():
        conv.weight *= 1e38
    return it.case(layer.path)


def convolution_and_norm(it: Subject) -> tuple[nn.Module, NormLayer]:
    """Return a convolution in the middle of the model, and the norm that follows it."""
    modules = [m for m in it.model.modules() if not any(m.children()) or is_norm(it, m)]
    layers = {layer.module: layer for layer in it.layers}
    pairs = [
        (a, layers[b])
        for a, b in pairwise(modules)
        if isinstance(a, nn.modules.conv._ConvNd)
        and b in layers
        and a.out_channels == layers[b].num_features
    ]
    return pairs[len(pairs) // 2]


def is_norm(it: Subject, module: nn.Module) -> bool:
    return any(layer.module is module for layer in it.layers)


def dropout_before_the_convolution(it: Subject) -> Case:
    conv, layer = convolution_and_norm(it)
    path = next(name for name, module in it.model.named_modules() if module is conv)
    it.put(path, nn.Sequential(nn.Dropout(0.5), conv))
    return it.case(layer.path)


def features_on_the_last_axis(it: Subject) -> Case:
    """A decoder of captions on the features, with BatchNorm1d on (N, L, C)."""
    it.model, it.forward = Captions(it.model, it.call, classes(it)), None
    it.recalibrate()
    return it.case("norm", select=("DEFAULT", "SN208"))


def lazy(it: Subject) -> Case:
    rank = {1: nn.LazyBatchNorm1d, 2: nn.LazyBatchNorm2d, 3: nn.LazyBatchNorm3d}
    path = it.victim.path
    it.put(path, rank[it.batches()[0].dim() - 2]())
    return Case(it.model, (path,))


def stripped(it: Subject) -> Case:
    """A norm with an activation inside, converted by torch."""
    path = it.victim.path
    norm = with_activation(it.victim.module)
    it.put(path, nn.SyncBatchNorm.convert_sync_batchnorm(norm))
    it.recalibrate()
    return it.case(path, select=("DEFAULT", "SN503"))


def foreign_without_eps(it: Subject) -> Case:
    path = it.victim.path
    it.put(path, FrozenBatchNorm2d(it.victim.module))
    it.recalibrate()
    return it.case(path)


# --------------------------------------------------------------------------- training


def trained(
    it: Subject, kind: Any = steps.plain, paths: tuple[str, ...] = (), **given: Any
) -> Case:
    """Check with a training step of a kind; it concerns all layers where no paths are given."""
    optimizer = steps.sgd(it.model, lr=0.01)
    train_step = kind(optimizer)
    return it.case(*(paths or it.paths), train_step=train_step, optimizer=optimizer, **given)


def frozen_backbone(it: Subject) -> Case:
    it.as_function()
    frozen = freeze_parameters_up_to(it)
    it.model.train()
    return trained(it, paths=frozen)


def left_in_eval(it: Subject) -> Case:
    """As a validation has left it."""
    it.as_function()
    it.model.eval()
    return trained(it)


def checkpointing(it: Subject) -> Case:
    it.as_function()
    it.model.train()
    return trained(it, lambda optimizer: steps.checkpointed(optimizer, reentrant=False))


def checkpointing_reentrant(it: Subject) -> Case:
    it.as_function()
    it.model.train()
    return trained(it, lambda optimizer: steps.checkpointed(optimizer, reentrant=True))


def sharpness_aware(it: Subject) -> Case:
    it.as_function()
    it.model.train()
    return trained(it, steps.sam)


def attacked(it: Subject) -> Case:
    it.as_function()
    it.model.train()
    return trained(it, lambda optimizer: steps.attacking(optimizer, by_backward=False))


def validation_inside(it: Subject) -> Case:
    it.as_function()
    it.model.train()
    return trained(it, steps.validating)


def micro_batches(it: Subject) -> Case:
    it.as_function()
    it.model.train()
    return trained(it, steps.accumulating, select=("DEFAULT", "SN307"))


def gradient_penalty(it: Subject) -> Case:
    it.as_function()
    it.model.train()
    return trained(it, steps.penalised, select=("DEFAULT", "SN311"))


def stale_gradient(it: Subject) -> Case:
    """Freeze a weight after a backward, in an optimizer that decays it."""
    it.as_function()
    it.model.train()
    optimizer = torch.optim.SGD(it.model.parameters(), lr=0.01, weight_decay=0.1)
    steps.loss_of(it.model(it.batches()[0])).backward()
    it.victim.weight.requires_grad_(False)

    def train_step(model: nn.Module, x: Tensor) -> None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = None
        steps.loss_of(model(x)).backward()
        optimizer.step()

    return it.case(it.victim.path, train_step=train_step, optimizer=optimizer)


def replaced_after_the_optimizer(it: Subject) -> Case:
    optimizer = steps.sgd(it.model)
    it.put(it.victim.path, copy.deepcopy(it.victim.module))
    return it.case(it.victim.path, optimizer=optimizer)


def decayed(it: Subject) -> Case:
    own = list(it.victim.module.parameters())
    others = [p for p in it.model.parameters() if all(p is not q for q in own)]
    groups = [{"params": others}, {"params": own, "weight_decay": 0.01}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    return it.case(it.victim.path, optimizer=optimizer, select=("DEFAULT", "SN305"))


# --------------------------------------------------------------------------- data


def scaled_to_255(it: Subject) -> Case:
    return prepared(it, lambda x: 255 * x)


def normalised_for_another(it: Subject) -> Case:
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    return prepared(it, lambda x: (x - mean) / std)


def prepared(it: Subject, wrongly: Any) -> Case:
    """Train on images in 0..1, and check on the same prepared otherwise."""
    it.recalibrate([photo(x) for x in it.batches(64, seed=2)])
    return it.case(it.in_order[0], batches=[wrongly(photo(x)) for x in it.batches()])


def photo(x: Tensor) -> Tensor:
    """Make an image in 0..1, warm in colour."""
    return (x + torch.tensor([0.6, 0.0, -0.6]).view(1, 3, 1, 1)).sigmoid()


def domains_in_turns(it: Subject) -> Case:
    return shifted(it, lambda i: 3.0 * (i % 2), "SN308")


def sorted_batches(it: Subject) -> Case:
    return shifted(it, lambda i: 1.5 * i, "SN309")


def shifted(it: Subject, by: Any, code: str) -> Case:
    """Train on batches each of which is brighter by an amount of its own, and check on such."""

    def make(seed: int) -> list[Tensor]:
        return [x + by(i) for i, x in enumerate(it.batches(32, 8, seed))]

    it.recalibrate(make(2))
    return it.case(it.in_order[0], batches=make(1), select=("DEFAULT", code))


def answers_of_mates(it: Subject) -> Case:
    """A model that reads the class of a batch off what its samples have in common."""
    it.model, it.forward = Leaking(it.model, it.call), None
    batches = [
        (x + 2.0 * (i % 2), torch.full((8,), i % 2)) for i, x in enumerate(it.batches(64, 8))
    ]
    it.recalibrate([x for x, _ in batches])

    def accuracy(output: Tensor, batch: tuple[Tensor, Tensor]) -> float:
        return float(((output.flatten() > 0) == batch[1].bool()).float().mean())

    return it.case(*it.in_order, batches=batches, score=accuracy, select=("DEFAULT", "SN310"))


def padded(it: Subject) -> Case:
    """Samples of several lengths, padded with zeros at the end."""

    def make(seed: int, n: int) -> list[Tensor]:
        return [end_with_zeros(x) for x in it.batches(n, seed=seed)]

    it.recalibrate(make(2, 64))
    return it.case(it.in_order[0], batches=make(1, 32), select=("DEFAULT", "SN209"))


def end_with_zeros(x: Tensor) -> Tensor:
    length = x.shape[-1]
    ends = length // 4 + torch.arange(len(x)) % (length // 2)
    beyond = torch.arange(length) >= ends[:, None]
    return x.masked_fill(beyond.view(len(x), *[1] * (x.dim() - 2), length), 0)


def infinite_sample(it: Subject) -> Case:
    batches = it.batches()
    batches[1][3, 0] = torch.inf
    return it.case(it.in_order[0], batches=batches)


def averaged_weights(it: Subject) -> Case:
    """Average weights over a way that one convolution goes, with the statistics of its end."""
    conv, layer = convolution_and_norm(it)
    average = AveragedModel(it.model)
    for _ in range(4):
        with torch.no_grad():
            conv.weight += conv.weight.std() * torch.randn_like(conv.weight)
        it.recalibrate()
        average.update_parameters(it.model)
    it.model = average
    return it.case(layer.path, select=("DEFAULT", "SN602"))


# --------------------------------------------------------------------------- files


def without_statistics(it: Subject, folder: Path) -> Case:
    """A checkpoint in which one layer has a count of batches and nothing counted."""
    state = it.model.state_dict()
    for name in ("running_mean", "running_var"):
        del state[f"{it.victim.path}.{name}"]
    return saved(state, folder, it.victim.path)


def without_one_variance(it: Subject, folder: Path) -> Case:
    state = it.model.state_dict()
    del state[f"{it.victim.path}.running_var"]
    return saved(state, folder, it.victim.path)


def saved_with_nan(it: Subject, folder: Path) -> Case:
    not_a_number(it)
    return saved(it.model.state_dict(), folder, it.victim.path)


def saved_with_negative_variance(it: Subject, folder: Path) -> Case:
    negative_variance(it)
    return saved(it.model.state_dict(), folder, it.victim.path)


def saved_as_memory_was(it: Subject, folder: Path) -> Case:
    it.victim.module.num_batches_tracked.fill_(2**40)
    return saved(it.model.state_dict(), folder, it.victim.path)


def saved_in_half_precision(it: Subject, folder: Path) -> Case:
    """In float16, which has lost the variance of a channel."""
    it.victim.module.running_var[0] = 1e-8
    it.victim.module.half()
    return saved(it.model.state_dict(), folder, it.victim.path)


def saved(state: dict[str, Tensor], folder: Path, path: str) -> Case:
    torch.save(state, folder / "model.pt")
    return Case(folder / "model.pt", (path,))


def exported_in_train_mode(it: Subject, folder: Path) -> Case:
    return exported(it.model.train(), it, folder, it.in_order)


def exported_with_one_layer_in_train_mode(it: Subject, folder: Path) -> Case:
    it.victim.module.train()
    return exported(it.model, it, folder, (it.victim.path,))


def exported(model: nn.Module, it: Subject, folder: Path, paths: tuple[str, ...]) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (it.batches()[0][:2],))
        torch.export.save(program, folder / "model.pt2")
    return Case(folder / "model.pt2", paths)
