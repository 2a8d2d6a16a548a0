"""`restore` puts tensors, switches and holds back to the bit, or changes nothing at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stillnorm as sn
from stillnorm.errors import StateError
from stillnorm.state import restore as room
from support import layers
from support.fingerprint import Fingerprint, values


def prepared() -> nn.Sequential:
    """One layer held whole, one with learning affine, one free; odd settings."""
    model = layers.conv_net().train()
    model[6].momentum = None
    model[6].weight.requires_grad_(False)
    sn.freeze(model, "1")
    sn.freeze(model, "3", affine="trains")
    return model


def step(model: nn.Module) -> None:
    loss = model(layers.conv_input()).square().sum()
    if loss.requires_grad:
        loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()


CHANGES: dict[str, Callable[[Any], object]] = {
    "train": lambda m: m.train(),
    "eval": lambda m: m.eval(),
    "step": step,
    "freeze": lambda m: sn.freeze(m),
    "freeze, affine trains": lambda m: sn.freeze(m, affine="trains"),
    "unfreeze": lambda m: sn.unfreeze(m),
    "momentum": lambda m: [setattr(m[i], "momentum", 0.7) for i in (1, 6)],
    "eps": lambda m: [setattr(m[i], "eps", 0.5) for i in (1, 6)],
    "track_running_stats": lambda m: setattr(m[6], "track_running_stats", False),
    "requires_grad": lambda m: m.requires_grad_(True),
    "no requires_grad": lambda m: m.requires_grad_(False),
    "NaN": lambda m: m[1].running_var.fill_(torch.nan),
    "negative zero": lambda m: m[1].running_mean.mul_(-0.0),
    "other numbers": lambda m: layers.settle(m, 9),
    "reset": lambda m: m[1].reset_parameters(),
    "statistics replaced": lambda m: setattr(m[1], "running_mean", torch.ones(4)),
}


def norm_values(model: nn.Module) -> dict[str, object]:
    return {n: v for n, v in values(model).items() if n.startswith(("1.", "3.1.", "6."))}


@pytest.mark.filterwarnings("ignore::stillnorm.errors.StillnormWarning")
@settings(max_examples=60)
@given(st.lists(st.sampled_from(sorted(CHANGES)), min_size=1, max_size=5))
def test_restore_is_exact(names: list[str]) -> None:
    model = prepared()
    before, bits = sn.snapshot(model), norm_values(model)
    for name in names:
        CHANGES[name](model)
    objects = {n: id(t) for n, t in model.state_dict(keep_vars=True).items()}
    expected = before.diff(model)
    undone = before.restore(model)
    assert str(undone) == str(expected)
    assert not before.diff(model)
    assert norm_values(model) == bits
    assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == objects
    # The model goes on as if nothing had been: unfreezing gives what it would have given.
    fresh = prepared()
    for net in (model, fresh):
        sn.unfreeze(net)
    for ours, theirs in zip(model.modules(), fresh.modules(), strict=True):
        if hasattr(ours, "running_mean"):
            assert ours.training == theirs.training
            assert ours.weight.requires_grad == theirs.weight.requires_grad
            assert ours.bias.requires_grad == theirs.bias.requires_grad


@pytest.mark.parametrize("name", layers.CASES)
def test_every_kind_of_layer_is_held_again(name: str) -> None:
    model = nn.Sequential(layers.make(name)).train()
    x = layers.example(name)
    sn.freeze(model)
    before, expected = sn.snapshot(model), model(x)
    sn.unfreeze(model)
    model.train()(x)
    before.restore(model)
    before.verify(model)
    assert torch.equal(model.train()(x), expected)


def test_an_unchanged_model_is_not_touched() -> None:
    model = prepared()
    before, found = sn.snapshot(model), Fingerprint(model)
    assert not before.restore(model)
    assert Fingerprint(model).differences(found) == []


def test_only_what_differs_is_written() -> None:
    model = prepared()
    before = sn.snapshot(model)
    model[1].running_mean.add_(1)
    versions = {n: t._version for n, t in model.state_dict(keep_vars=True).items()}
    before.restore(model)
    written = {n for n, t in model.state_dict(keep_vars=True).items() if t._version != versions[n]}
    assert written == {"1.running_mean"}


def test_a_model_cast_since_gets_the_cast() -> None:
    model = layers.conv_net()
    before = sn.snapshot(model)
    mean = model[1].running_mean.clone()
    model.half()
    model[1].running_mean.zero_()
    before.restore(model)
    assert torch.equal(model[1].running_mean, mean.half())


def test_new_layers_and_other_weights_are_left_alone() -> None:
    model = prepared()
    before = sn.snapshot(model)
    model.append(nn.BatchNorm1d(5))
    with torch.no_grad():
        model[7].running_mean.fill_(3)
        model[0].weight.fill_(3)
    difference = before.restore(model)
    assert difference.new == ("7",)
    assert model[7].running_mean.tolist() == [3] * 5
    assert (model[0].weight == 3).all()


def test_a_layer_under_two_names_that_has_become_two() -> None:
    model = nn.ModuleDict({"a": nn.BatchNorm1d(2)})
    model["b"] = model["a"]
    before = sn.snapshot(model)
    model["b"] = nn.BatchNorm1d(2, momentum=0.5)
    model["b"].running_mean.fill_(4)
    before.restore(model)
    assert model["b"].running_mean.tolist() == [0, 0]
    assert model["b"].momentum == 0.1


def test_torchscript_tensors_are_restored() -> None:
    model = torch.jit.script(layers.conv_net().train())
    before = sn.snapshot(model)
    model(layers.conv_input())
    model.eval()
    before.restore(model)
    assert not before.diff(model)


# --------------------------------------------------------------------------------- all or nothing


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def parametrize(layer: nn.Module) -> None:
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())


def foreign() -> nn.Module:
    frozen = torchvision.ops.FrozenBatchNorm2d(4)
    frozen.register_buffer("num_batches_tracked", torch.tensor(7))
    return frozen


def without(model: nn.Module) -> nn.Module:
    model[6] = nn.Identity()
    return model


REFUSALS: dict[str, tuple[Callable[[Any], object], str]] = {
    "gone": (without, "6 cannot be restored: the model has no norm layer there"),
    "other shape": (
        lambda m: m.__setitem__(6, nn.BatchNorm1d(9)),
        "6 cannot be restored: weight shape (5,) -> (9,)",
    ),
    "no affine": (
        lambda m: m.__setitem__(6, nn.BatchNorm1d(5, affine=False)),
        "6 cannot be restored: weight gone",
    ),
    "lazy": (lambda m: m.__setitem__(6, nn.LazyBatchNorm1d()), "6 cannot be restored: "),
    "parametrized": (
        lambda m: parametrize(m[6]),
        "6 cannot be restored: weight is computed from other tensors",
    ),
    "held, another library's now": (
        lambda m: m.__setitem__(1, foreign()),
        "1 cannot be restored: it was held and is a FrozenBatchNorm2d of torchvision now",
    ),
    "TorchScript": (
        lambda m: m.__setitem__(1, torch.jit.script(layers.settle(nn.BatchNorm2d(4)))),
        "1 cannot be restored: a TorchScript module",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_restored_is_named_and_nothing_changes(name: str) -> None:
    model = prepared()
    before = sn.snapshot(model)
    layers.settle(model, 9)
    sn.unfreeze(model)
    change, said = REFUSALS[name]
    change(model)
    found = Fingerprint(model)
    with pytest.raises(StateError) as caught:
        before.restore(model)
    assert caught.value.fact.startswith(said)
    assert caught.value.help.startswith("nothing was changed")
    assert Fingerprint(model).differences(found) == []


def test_a_hold_that_torch_has_wrapped_since_is_not_released() -> None:
    model = layers.conv_net()
    before = sn.snapshot(model)
    sn.freeze(model)
    parametrize(model[3][1])
    found = Fingerprint(model)
    with pytest.raises(StateError, match=r"3\.1 cannot be restored"):
        before.restore(model)
    assert Fingerprint(model).differences(found) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("point", range(12))
def test_an_exception_at_any_point_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, point: int, error: type[BaseException]
) -> None:
    model = prepared()
    before = sn.snapshot(model)
    for name in ("unfreeze", "momentum", "other numbers", "no requires_grad"):
        CHANGES[name](model)
    sn.freeze(model, "6")
    found = Fingerprint(model, versions=False)
    calls = 0

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == point + 1:
                raise error
            return function(*args)

        return call

    for step in ("write", "hold", "release", "_put", "_must_match", "remember"):
        monkeypatch.setattr(room, step, counted(getattr(room, step)))
    with pytest.raises(error):
        before.restore(model)
    monkeypatch.undo()
    assert Fingerprint(model, versions=False).differences(found) == []
    before.restore(model)
    assert not before.diff(model)


def test_layers_that_have_come_to_share_a_tensor_cannot_both_be_restored() -> None:
    model = nn.Sequential(layers.settle(nn.BatchNorm1d(3)), layers.settle(nn.BatchNorm1d(3), 2))
    before = sn.snapshot(model)
    model[1].running_mean = model[0].running_mean
    found = Fingerprint(model, versions=False)
    with pytest.raises(StateError, match="0 cannot be restored: running_mean"):
        before.restore(model)
    assert Fingerprint(model, versions=False).differences(found) == []


def test_restore_and_preserved_agree() -> None:
    """Two ways to the same end, checked against each other."""
    one, two = prepared(), prepared()
    before = sn.snapshot(one)
    CHANGES["other numbers"](one)
    sn.unfreeze(one)
    before.restore(one)
    with contextlib.suppress(ValueError), sn.preserved(two):
        CHANGES["other numbers"](two)
        sn.unfreeze(two)
        raise ValueError
    assert values(one) == values(two)
    assert repr(one) == repr(two)


def test_layers_are_held_again_after_convert_sync_batchnorm() -> None:
    """The class stays a SyncBatchNorm's; tensors, switches and the hold come back."""
    model = prepared()
    before = sn.snapshot(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    before.restore(converted)
    before.verify(converted, ["1", "3"])
    assert type(converted[1]).__name__ == "HeldSyncBatchNorm"


@pytest.mark.usefixtures("process_group")
def test_a_hold_that_would_break_data_parallel_training_is_refused() -> None:
    model = prepared()
    before = sn.snapshot(model)
    sn.unfreeze(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    found = Fingerprint(model)
    with pytest.raises(StateError, match="inside DistributedDataParallel"):
        before.restore(wrapped)
    assert Fingerprint(model).differences(found) == []
