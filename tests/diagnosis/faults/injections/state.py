"""Faults of modes, freezing and statistics."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from diagnosis.faults.grid import Case, Subject
from diagnosis.faults.injections.places import (
    freeze_parameters_up_to,
    unlike_in_variance,
    widest_in_variance,
)
from diagnosis.faults.parts import Hidden, stubborn
from stillnorm import freeze


def frozen_parameters(it: Subject) -> Case:
    """Freeze everything up to the victim by requires_grad."""
    frozen = freeze_parameters_up_to(it)
    return Case(it.model, frozen)


def frozen_parameters_with_data(it: Subject) -> Case:
    frozen = freeze_parameters_up_to(it)
    return it.case(*frozen)


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
