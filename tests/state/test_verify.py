"""`verify` passes what is frozen, and names what moved, what would, and what is not there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stillnorm as sn
from stillnorm.errors import SelectorError, VerifyError
from support import layers
from support.fingerprint import Fingerprint


def fault(snapshot: sn.Snapshot, model: nn.Module, selected: Any = None) -> str:
    with pytest.raises(VerifyError) as caught:
        snapshot.verify(model, selected)
    assert caught.value.help
    assert "\n" not in caught.value.fact
    return caught.value.fact


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    loss = model(layers.conv_input()).square().sum()
    if loss.requires_grad:
        loss.backward()
    if optimizer is not None:
        optimizer.step()


# ---------------------------------------------------------------------------------- thread 000


def test_the_threads_audit_passes_where_verify_does_not() -> None:
    """Thread 000, its own code: averages agree to the end, and the model is not frozen."""
    model = layers.conv_net().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0
            module.requires_grad_(False)

    def audit() -> list[list[float]]:
        temp = []

        def frozen_fn(m: nn.Module) -> None:
            classname = m.__class__.__name__
            if classname.find("BatchNorm2d") != -1:
                temp.append(
                    [
                        np.average(m.running_mean.data.cpu().numpy()),
                        np.average(m.running_var.data.cpu().numpy()),
                        np.average(m.weight.data.cpu().numpy()),
                        np.average(m.bias.data.cpu().numpy()),
                    ]
                )

        model.apply(frozen_fn)
        return temp

    critemp, before = audit(), sn.snapshot(model)
    selected = lambda path, module: isinstance(module, nn.BatchNorm2d)  # noqa: E731
    said = fault(before, model, selected)
    assert said == (
        "1: would normalise by the batch in train(): momentum 0 stops only the updates "
        "(and 1 more layer)"
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for _ in range(3):
        step(model, optimizer)
    assert audit() == critemp
    assert "would normalise by the batch" in fault(before, model, selected)
    model.eval()
    assert audit() == critemp
    assert "would normalise by the batch" in fault(before, model, selected)


# ------------------------------------------------------------------------------ what is frozen


@pytest.mark.parametrize("name", layers.CASES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_held_layer_of_every_kind_passes_after_training(name: str, when: str) -> None:
    model = nn.Sequential(layers.make(name)).train()
    if when == "before":
        before = sn.snapshot(model)
    sn.freeze(model)
    if when == "after":
        before = sn.snapshot(model)
    before.verify(model)
    model.train()
    model[0].train()
    model(layers.example(name))
    before.verify(model)
    model.eval()
    before.verify(model)


HARMLESS: dict[str, Callable[[nn.Module], object]] = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "child train": lambda m: m[1].train(),
    "flag written": lambda m: setattr(m[1], "training", True),
    "step": step,
    "adam": lambda m: step(m, torch.optim.AdamW(m.parameters(), 0.1, weight_decay=0.5)),
    "sgd": lambda m: step(m, torch.optim.SGD(m.parameters(), 0.1, weight_decay=0.5)),
    "no gradients": lambda m: m.requires_grad_(False),
    "zero_grad": lambda m: m.zero_grad(set_to_none=False),
    "freeze": lambda m: sn.freeze(m),
    "eval_mode": lambda m: sn.eval_mode(m).__enter__(),
    "state_dict": lambda m: m.load_state_dict(m.state_dict()),
    "hook": lambda m: m[1].register_forward_hook(lambda *a: None),
}

HARMFUL: dict[str, tuple[Callable[[nn.Module], object], str]] = {
    "unfreeze": (
        lambda m: sn.unfreeze(m, "1"),
        "1: its hold is gone: it would normalise by the batch in train()",
    ),
    "affine trains": (
        lambda m: sn.freeze(m, "1", affine="trains"),
        "1: its affine parameters were held and train now",
    ),
    "one bit": (
        lambda m: m[1].running_var.view(torch.int32)[2].bitwise_xor_(1),
        "1: running_var[2] ",
    ),
    "negative zero": (lambda m: m[1].bias.data.mul_(-1), "1: bias["),
    "load_state_dict": (
        lambda m: m.load_state_dict(layers.conv_net(7).state_dict()),
        "1: weight[",
    ),
    "counter": (
        lambda m: m[1].num_batches_tracked.add_(1),
        "1: num_batches_tracked 7 -> 8, by 1",
    ),
    "momentum": (lambda m: setattr(m[1], "momentum", 0.5), "1: momentum 0.1 -> 0.5"),
    "eps": (lambda m: setattr(m[1], "eps", 1e-3), "1: eps 1e-05 -> 0.001"),
    "track_running_stats": (
        lambda m: setattr(m[1], "track_running_stats", False),
        "1: track_running_stats True -> False",
    ),
    "requires_grad": (
        lambda m: m.requires_grad_(True),
        "1: weight.requires_grad False -> True; bias.requires_grad False -> True (and 2 more",
    ),
    "statistics gone": (lambda m: setattr(m[1], "running_mean", None), "1: running_mean gone"),
    "other size": (
        lambda m: setattr(m[1], "running_mean", torch.zeros(9)),
        "1: running_mean shape (4,) -> (9,)",
    ),
    "layer gone": (lambda m: m.__setitem__(1, nn.Identity()), "1: is no norm layer any more"),
    "layer new": (lambda m: m.append(nn.BatchNorm1d(5)), "7: is not in the snapshot"),
    "convert": (
        lambda m: m.__setitem__(1, nn.SyncBatchNorm.convert_sync_batchnorm(m[1])),
        "1: convert_sync_batchnorm made a new layer of it, which is not held",
    ),
}


@settings(max_examples=50)
@given(st.lists(st.sampled_from(sorted(HARMLESS)), max_size=5), st.booleans())
def test_any_sequence_of_harmless_things_passes(names: list[str], snapshot_first: bool) -> None:
    model = layers.conv_net().train()
    early = sn.snapshot(model)
    sn.freeze(model)
    before = early if snapshot_first else sn.snapshot(model)
    for name in names:
        HARMLESS[name](model)
    before.verify(model)


@pytest.mark.parametrize("harm", HARMFUL)
def test_one_harmful_thing_among_them_is_named(harm: str) -> None:
    model = layers.conv_net().train()
    sn.freeze(model)
    before = sn.snapshot(model)
    for change in HARMLESS.values():
        change(model)
    change, said = HARMFUL[harm]
    change(model)
    assert fault(before, model).startswith(said)
    for mode in (model.eval, model.train, model.eval):
        mode()
        assert fault(before, model).startswith(said)


def test_a_change_says_layer_tensor_channel_and_size() -> None:
    model = layers.conv_net()
    sn.freeze(model)
    before = sn.snapshot(model)
    with torch.no_grad():
        model[3][1].weight[4] += 0.25
        old, new = float(before.layers[1].tensors["weight"][4]), float(model[3][1].weight[4])
    assert fault(before, model) == (
        f"3.1: weight[4] {old:.7g} -> {new:.7g}, by {abs(new - old):.2g}, 1 of 6 channels changed"
    )


def test_many_faults_are_counted() -> None:
    model = layers.conv_net().train()
    before = sn.snapshot(model)
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    said = fault(before, model)
    assert said.startswith("1: weight[")
    assert said.endswith("; would normalise by the batch in train(); 4 more (and 2 more layers)")


def test_a_moved_layer_that_is_not_held_says_both() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    before = sn.snapshot(model)
    with torch.no_grad():
        model[0].running_mean[1] = 3
    assert fault(before, model) == (
        "0: running_mean[1] 0 -> 3, by 3, 1 of 2 channels changed; "
        "would normalise by the batch in train()"
    )


# ------------------------------------------------------------- affine parameters that may learn


@pytest.mark.parametrize("when", ["before", "after"])
def test_affine_that_trains_may_move_and_statistics_may_not(when: str) -> None:
    model = layers.conv_net().train()
    if when == "before":
        before = sn.snapshot(model)
    sn.freeze(model, affine="trains")
    if when == "after":
        before = sn.snapshot(model)
    weight = model[1].weight.clone()
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    assert not torch.equal(weight, model[1].weight)
    before.verify(model)
    model[1].weight.requires_grad_(False)
    before.verify(model)
    model[1].running_mean[0] += 1
    assert fault(before, model).startswith("1: running_mean[0]")


def test_affine_frozen_after_it_has_trained_passes() -> None:
    model = layers.conv_net().train()
    sn.freeze(model, affine="trains")
    before = sn.snapshot(model)
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    sn.freeze(model)
    before.verify(model)


# -------------------------------------------------------------------------------- casts and copies


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_cast_of_what_was_recorded_passes_and_nothing_else(dtype: torch.dtype) -> None:
    model = layers.conv_net()
    sn.freeze(model)
    before = sn.snapshot(model)
    model.to(dtype)
    before.verify(model)
    assert before.diff(model)
    model[1].running_mean[1] *= 2
    assert fault(before, model).startswith("1: running_mean[1] float32 -> ")


def test_a_cast_and_back_that_lost_bits_is_named() -> None:
    model = layers.conv_net()
    sn.freeze(model)
    before = sn.snapshot(model)
    model.double().float()
    before.verify(model)
    model.half().float()
    assert fault(before, model).startswith("1: weight[")


def test_copies_pass() -> None:
    model = layers.conv_net()
    sn.freeze(model)
    before = sn.snapshot(model)
    before.verify(copy.deepcopy(model))
    before.verify(pickle.loads(pickle.dumps(model)))


# ------------------------------------------------------------------------------ what undoes a hold


@pytest.mark.parametrize("when", ["before", "after"])
def test_convert_sync_batchnorm_is_named(when: str) -> None:
    model = layers.conv_net()
    early = sn.snapshot(model)
    sn.freeze(model)
    before = early if when == "before" else sn.snapshot(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert fault(before, model) == (
        "1: convert_sync_batchnorm made a new layer of it, which is not held (and 2 more layers)"
    )


def test_layers_held_after_the_conversion_pass() -> None:
    model = layers.conv_net()
    before = sn.snapshot(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    sn.freeze(model)
    before.verify(model)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("mode", [True, False])
def test_torchscript_is_named(when: str, mode: bool) -> None:
    model = layers.conv_net()
    early = sn.snapshot(model)
    sn.freeze(model)
    before = early if when == "before" else sn.snapshot(model)
    scripted = torch.jit.script(model).train(mode)
    assert fault(before, scripted) == (
        "1: TorchScript's train() normalises by the batch: torch.jit.script undoes a hold "
        "(and 2 more layers)"
    )


# --------------------------------------------------------------------- what others hold, or do not


class Freezing(nn.Module):
    """mmdetection's `norm_eval`."""

    def __init__(self) -> None:
        super().__init__()
        self.body = layers.conv_net()

    def train(self, mode: bool = True) -> Freezing:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def test_a_layer_that_the_models_own_train_keeps_in_eval_passes() -> None:
    model = Freezing().train()
    before = sn.snapshot(model)
    before.verify(model)
    model.body[1].train()  # and one that is thawed at this moment does not
    assert fault(before, model) == "body.1: would normalise by the batch in train()"


def test_a_lost_hold_is_named_though_something_else_keeps_the_layer() -> None:
    model = Freezing().train()
    sn.freeze(model)
    before = sn.snapshot(model)
    sn.unfreeze(model)
    model.requires_grad_(False)
    assert fault(before, model) == "body.1: its hold is gone (and 2 more layers)"


def test_a_layer_merely_in_eval_mode_does_not_pass() -> None:
    model = layers.conv_net().eval()
    before = sn.snapshot(model)
    assert fault(before, model) == "1: would normalise by the batch in train() (and 2 more layers)"


def test_other_libraries_frozen_layers_pass() -> None:
    model = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(3))
    before = sn.snapshot(model)
    model.train()
    before.verify(model)
    model[0].weight[2] = 7
    assert fault(before, model) == "0: weight[2] 1 -> 7, by 6, 1 of 3 channels changed"


def test_batch_norm_without_statistics_does_not_pass() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False))
    before = sn.snapshot(model)
    assert fault(before, model) == (
        "0: has no running statistics: it normalises by the batch in eval() too"
    )


def test_instance_norms_pass_where_train_and_eval_are_the_same() -> None:
    plain = nn.Sequential(nn.InstanceNorm1d(3))
    sn.snapshot(plain).verify(plain)
    tracking = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True))
    assert fault(sn.snapshot(tracking), tracking) == "0: would normalise by the sample in train()"
    tracking[0].momentum = 0.0
    assert "momentum 0 stops only the updates" in fault(sn.snapshot(tracking), tracking)


# --------------------------------------------------------------------------------------- selectors


def test_only_the_selected_layers_are_checked() -> None:
    model = layers.conv_net().train()
    sn.freeze(model, "3")
    before = sn.snapshot(model)
    step(model, torch.optim.SGD(model.parameters(), 0.1))
    before.verify(model, "3")
    before.verify(model, ["3.1"])
    before.verify(model, (part for part in ["3.1"]))
    before.verify(model, model[3])
    fault(before, model)
    fault(before, model, ["3", "6"])
    fault(before, model, nn.BatchNorm1d)


@pytest.mark.parametrize(
    "selected",
    [
        "3",
        "3.*",
        ["1", "3.1"],
        lambda m: m[3],
        lambda m: [m[3]],
        lambda m: lambda path, module: path.startswith("3"),
        lambda m: m,
    ],
)
@pytest.mark.parametrize("now", [nn.Identity, lambda: nn.GroupNorm(2, 6), None])
def test_a_selected_layer_that_is_gone_is_named(selected: Any, now: Any) -> None:
    model = layers.conv_net()
    sn.freeze(model)
    before = sn.snapshot(model)
    if now is None:
        del model[3][1]
    else:
        model[3][1] = now()
    if callable(selected):
        selected = selected(model)
    assert fault(before, model, selected) == "3.1: is no norm layer any more"
    before.verify(model, ["1", "6"])


def test_a_selector_that_never_matched_is_an_error_of_its_own() -> None:
    model = layers.conv_net()
    sn.freeze(model)
    before = sn.snapshot(model)
    with pytest.raises(SelectorError, match="'backbone' matches no norm layer"):
        before.verify(model, "backbone")


def test_the_snapshot_of_another_model_is_told() -> None:
    model = layers.conv_net()
    sn.freeze(model)
    assert fault(sn.snapshot(model[3]), model).startswith("1: weight shape (6,) -> (4,); ")
    assert fault(sn.snapshot(model), model[3]).startswith("3.1: is no norm layer any more")


# ------------------------------------------------------------------------------------- only looks


@pytest.mark.parametrize(
    "make", [layers.conv_net, Freezing, lambda: nn.Sequential(layers.make("own train()"))]
)
def test_verify_and_diff_only_look(make: Callable[[], nn.Module]) -> None:
    model = make().train()
    before = sn.snapshot(model)
    found = Fingerprint(model)
    with pytest.raises(VerifyError):
        before.verify(nn.Sequential(model))
    before.diff(model)
    sn.snapshot(model)
    assert Fingerprint(model).differences(found) == []
