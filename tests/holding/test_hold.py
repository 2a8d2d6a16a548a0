"""One layer: the reasons why not, holding, releasing, and putting back exactly."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from stillnorm.holding import hold, release, remember, why_not, why_not_release
from stillnorm.norms import NormLayer, find_norms, hold_of
from support import layers
from support.fingerprint import Fingerprint
from support.layers import CASES


def view(layer: nn.Module) -> NormLayer:
    (norm,) = find_norms(layer)
    return norm


def parametrized() -> nn.Module:
    layer = layers.make("2d")
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    return layer


def untracked_later() -> nn.Module:
    layer = nn.InstanceNorm2d(4, track_running_stats=True)
    layer.track_running_stats = False
    return layer


def own_instance_forward() -> nn.Module:
    layer = layers.make("2d")
    forward = layer.forward
    layer.forward = lambda x: forward(x)  # as accelerate's hooks and OFA's recalibration do
    return layer


REASONS = {
    "forward of the instance": (own_instance_forward, "on the instance"),
    "lazy": (nn.LazyBatchNorm2d, "lazy"),
    "lazy instance": (lambda: nn.LazyInstanceNorm2d(track_running_stats=True), "lazy"),
    "no statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), "running statistics"),
    "instance": (lambda: nn.InstanceNorm2d(4), "running statistics"),
    "instance untracked later": (untracked_later, "by the sample"),
    "parametrized": (parametrized, "parametrized"),
    "scripted": (lambda: torch.jit.script(nn.BatchNorm2d(4)), "TorchScript"),
}


@pytest.mark.parametrize("affine", ["frozen", "trains"])
@pytest.mark.parametrize("name", REASONS)
def test_reasons_why_a_layer_cannot_be_held(name: str, affine: str) -> None:
    make, words = REASONS[name]
    reason = why_not(view(make()), affine)  # type: ignore[arg-type]
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", amount=1),
        lambda layer: prune.identity(layer, "bias"),
        lambda layer: nn.utils.weight_norm(layer, dim=None),
    ],
)
def test_affine_computed_from_other_parameters_is_refused(
    change: Callable[[nn.Module], object],
) -> None:
    """The optimizer would move what it is computed from; statistics alone can be held."""
    layer = layers.make("2d")
    change(layer)
    reason = why_not(view(layer), "frozen")
    assert reason is not None
    assert "computed from other parameters" in reason
    assert why_not(view(layer), "trains") is None


@pytest.mark.parametrize("affine", ["frozen", "trains"])
@pytest.mark.parametrize("name", CASES)
def test_no_reason_for_the_others(name: str, affine: str) -> None:
    assert why_not(view(layers.make(name)), affine) is None  # type: ignore[arg-type]


def test_tracking_switched_off_later_can_be_held() -> None:
    """The buffers are there and eval mode uses them (thread 004): that is what is held."""
    layer = layers.make("2d")
    layer.track_running_stats = False
    expected = layer.eval()(layers.example("2d"))
    assert why_not(view(layer), "frozen") is None
    hold(layer, "frozen")
    assert torch.equal(layer.train()(layers.example("2d")), expected)


# ------------------------------------------------------------------------------- release


@pytest.mark.parametrize("affine", ["frozen", "trains"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_release_undoes_hold_to_the_last_byte(name: str, training: bool, affine: str) -> None:
    layer = layers.make(name).train(training)
    layer.register_forward_hook(lambda module, args, output: None)
    before = Fingerprint(layer)
    hold(layer, affine)  # type: ignore[arg-type]
    assert Fingerprint(layer) != before
    release(layer)
    assert Fingerprint(layer).differences(before) == []


@pytest.mark.parametrize("frozen_in", [True, False])
@pytest.mark.parametrize("calls", [(), (True,), (False,), (True, False), (False, True)])
def test_release_gives_the_mode_that_the_calls_since_would_have_given(
    frozen_in: bool, calls: tuple[bool, ...]
) -> None:
    layer = layers.make("2d").train(frozen_in)
    hold(layer, "frozen")
    for mode in calls:
        layer.train(mode)
    release(layer)
    assert layer.training is (calls[-1] if calls else frozen_in)


@pytest.mark.parametrize("name", ["2d", "own F.batch_norm", "instance2d"])
@pytest.mark.parametrize("forward", [True, False])
def test_release_hears_training_written_directly(name: str, forward: bool) -> None:
    """`layer.training = True`, before or after a forward took notice of it."""
    layer = layers.make(name).eval()
    hold(layer, "frozen")
    layer.training = True
    if forward:
        layer(layers.example(name))
    release(layer)
    assert layer.training


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("meanwhile", [None, True])
def test_requires_grad_comes_back_unless_the_user_changed_it(
    before: bool, meanwhile: bool | None
) -> None:
    layer = layers.make("2d")
    layer.weight.requires_grad_(before)
    hold(layer, "frozen")
    assert not layer.weight.requires_grad
    if meanwhile is not None:
        layer.weight.requires_grad_(meanwhile)
    release(layer)
    assert layer.weight.requires_grad is (before if meanwhile is None else meanwhile)
    assert layer.bias.requires_grad


def test_changing_what_is_held() -> None:
    """trains -> frozen -> trains -> released: requires_grad follows, the mode wish is kept."""
    layer = layers.make("2d").train()
    layer.bias.requires_grad_(False)
    hold(layer, "trains")
    held = type(layer)
    for affine, weight in (("frozen", False), ("trains", True), ("frozen", False)):
        hold(layer, affine)  # type: ignore[arg-type]
        assert type(layer) is held
        assert layer.weight.requires_grad is weight
        assert not layer.bias.requires_grad
    release(layer)
    assert layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert layer.training


def test_an_instance_entry_called_module_comes_back() -> None:
    """The hold shadows `__module__` on the instance, for torch.fx; the user's entry returns."""
    layer = layers.make("2d")
    layer.__dict__["__module__"] = "mine"
    hold(layer, "frozen")
    release(layer)
    assert layer.__dict__["__module__"] == "mine"


# ------------------------------------------------------------------------------- refused release


def test_release_is_refused_while_parametrized_and_works_afterwards() -> None:
    layer = layers.make("2d")
    base = type(layer)
    hold(layer, "frozen")
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    assert hold_of(layer) is not None
    reason = why_not_release(view(layer))
    assert reason is not None
    assert "ParametrizedHeldBatchNorm2d" in reason
    parametrize.remove_parametrizations(layer, "weight")
    assert why_not_release(view(layer)) is None
    release(layer)
    assert type(layer) is base


def test_weight_norm_on_a_held_layer_keeps_it_held() -> None:
    """Whatever parametrisation: still no update, still no gradient to the scale."""
    layer = layers.make("2d")
    hold(layer, "frozen")
    parametrizations.weight_norm(layer, dim=None)
    before = layer.running_mean.clone()
    layer.train()
    layer(torch.randn(3, 4, 5, 5, requires_grad=True)).sum().backward()
    assert torch.equal(layer.running_mean, before)
    assert all(p.grad is None for p in layer.parameters())


# ------------------------------------------------------------------------------- remember


@pytest.mark.parametrize("name", CASES)
def test_remember_puts_back_whatever_hold_and_release_did(name: str) -> None:
    """Byte for byte, object for object, from each of the states a layer can be in."""
    x = layers.example(name).requires_grad_()
    for states in ([], ["trains"], ["frozen"], ["trains", "frozen"]):
        layer = layers.make(name)
        layer(x).sum().backward()  # gradients, which "frozen" drops
        for affine in states:
            hold(layer, affine)  # type: ignore[arg-type]
        for change in (
            lambda layer: hold(layer, "frozen"),
            lambda layer: hold(layer, "trains"),
            lambda layer: release(layer) if hold_of(layer) else None,
        ):
            before = Fingerprint(layer)
            put_back = remember(layer)
            change(layer)
            put_back()
            assert Fingerprint(layer).differences(before) == []


def test_a_hold_is_its_copys_own() -> None:
    """Releasing a copy leaves the original held, and the other way round."""
    layer = layers.make("2d")
    hold(layer, "frozen")
    twin = copy.deepcopy(layer)
    release(twin)
    assert hold_of(layer) is not None
    twin = copy.deepcopy(layer)
    release(layer)
    assert hold_of(twin) is not None
