"""The verb freeze: what it selects, refuses, warns of, reports; and that it only does that."""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch
from torch import nn

import stillnorm as sn
from stillnorm.errors import RefusedError, SelectorError, StillnormWarning
from stillnorm.norms import find_norms, hold_of
from support import layers
from support.fingerprint import Fingerprint, bits
from support.layers import CASES
from support.zoo import timm, torchvision


class Mixed(nn.Module):
    """One of everything: what can be held, what cannot, what another library froze."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.good = layers.settle(nn.BatchNorm2d(4))
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.lazy = nn.LazyBatchNorm2d()
        self.instance = nn.InstanceNorm2d(4)
        self.foreign = torchvision.ops.FrozenBatchNorm2d(4)
        self.group = nn.GroupNorm(2, 4)
        self.layer = nn.LayerNorm(4)


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_is_frozen_and_stays_so(name: str) -> None:
    net = nn.Sequential(layers.make(name))
    expected = net.eval()(layers.example(name))
    report = sn.freeze(net)
    assert report.frozen == ("0",)
    assert sn.is_frozen(net)
    net.train()
    assert bits(net(layers.example(name))) == bits(expected)


def test_a_model_that_is_itself_a_norm() -> None:
    layer = layers.make("2d")
    assert sn.freeze(layer).frozen == ("",)
    assert sn.is_frozen(layer)
    assert sn.unfreeze(layer).unfrozen == ("",)
    assert type(layer) is nn.BatchNorm2d


def test_only_norm_layers_are_frozen() -> None:
    """Not convolutions: their parameters, modes and dropouts stay as they are."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layers.make("2d"), nn.Dropout())
    sn.freeze(net)
    net.train()
    assert net.training
    assert net[0].training
    assert net[2].training
    assert net[0].weight.requires_grad


def test_only_the_selected_layers_are_touched() -> None:
    net = layers.conv_net()
    others = [net[1], net[6]]
    before = [Fingerprint(layer) for layer in others]
    assert sn.freeze(net, "3").frozen == ("3.1",)
    assert [Fingerprint(layer) for layer in others] == before
    assert sn.is_frozen(net, "3")
    assert not sn.is_frozen(net)


def test_no_tensor_is_written_and_no_buffer_rebound() -> None:
    """Values, identity, storage, version counters: freeze touches none of them."""
    net = layers.conv_net()
    named = net.state_dict(keep_vars=True)
    before = {key: (id(t), t.data_ptr(), t._version, bits(t)) for key, t in named.items()}
    sn.freeze(net)
    named = net.state_dict(keep_vars=True)
    assert {k: (id(t), t.data_ptr(), t._version, bits(t)) for k, t in named.items()} == before


# ------------------------------------------------------------------------------- refusals


def test_refusals_are_data_and_the_rest_is_frozen() -> None:
    net = Mixed()
    report = sn.freeze(net)
    assert report.frozen == ("good",)
    assert report.already_frozen == ("foreign",)
    reasons = dict(report.refused)
    assert set(reasons) == {"untracked", "lazy", "instance"}
    assert "track_running_stats" in reasons["untracked"]
    assert "lazy" in reasons["lazy"]
    for path, reason in report.refused:
        assert path in str(report)
        assert reason in " ".join(str(report).split())
    assert not sn.is_frozen(net)
    assert sn.is_frozen(net, ["good", "foreign"])


def test_a_foreign_frozen_layer_cannot_train_its_affine() -> None:
    """Its weight and bias are buffers: saying "already frozen" would be half the truth."""
    net = Mixed()
    report = sn.freeze(net, "foreign", affine="trains")
    assert report.already_frozen == ()
    assert "buffers" in dict(report.refused)["foreign"]


def test_strict_raises_and_changes_nothing() -> None:
    net = Mixed()
    before = Fingerprint(net)
    with pytest.raises(RefusedError) as error:
        sn.freeze(net, strict=True)
    assert "untracked" in str(error.value)
    assert "2 more" in str(error.value)
    assert "help:" in str(error.value)
    assert isinstance(error.value, RuntimeError)
    assert Fingerprint(net).differences(before) == []


def test_strict_is_silent_when_all_can_be_held() -> None:
    net = layers.conv_net()
    assert sn.freeze(net, strict=True).frozen == ("1", "3.1", "6")
    assert sn.freeze(net, strict=True).already_frozen == ("1", "3.1", "6")


def test_a_lazy_layer_can_be_frozen_after_its_first_forward() -> None:
    net = nn.Sequential(nn.LazyBatchNorm2d())
    assert sn.freeze(net).frozen == ()
    net(torch.randn(4, 3, 5, 5))
    assert sn.freeze(net).frozen == ("0",)
    assert type(net[0]).__name__ == "HeldBatchNorm2d"


@pytest.mark.parametrize("bad", ["", "no", True, None])
def test_a_wrong_affine_is_refused_before_anything_changes(bad: object) -> None:
    net = layers.conv_net()
    before = Fingerprint(net)
    with pytest.raises(ValueError, match="affine"):
        sn.freeze(net, affine=bad)  # type: ignore[arg-type]
    assert Fingerprint(net).differences(before) == []


def test_a_selector_that_matches_nothing_changes_nothing() -> None:
    net = layers.conv_net()
    before = Fingerprint(net)
    for verb in (sn.freeze, sn.unfreeze, sn.is_frozen):
        with pytest.raises(SelectorError, match="nearest"):
            verb(net, ["3", "layer9"])  # type: ignore[operator]
    assert Fingerprint(net).differences(before) == []


def test_a_model_without_norms_gives_empty_reports() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    assert sn.freeze(net) == sn.freeze(net, strict=True)
    assert sn.freeze(net).frozen == ()
    assert sn.unfreeze(net).unfrozen == ()
    assert sn.is_frozen(net)


# ------------------------------------------------------------------------------- the warning


def test_statistics_never_estimated_are_warned_of_with_their_path() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), layers.make("2d"))
    with pytest.warns(StillnormWarning, match=r"never estimated.*: 1\n.*recalibrate") as record:
        sn.freeze(net)
    assert len(record) == 1
    assert record[0].filename == __file__  # the user's line, not the library's


def test_no_warning_with_statistics_or_when_already_frozen() -> None:
    net = nn.Sequential(nn.BatchNorm2d(4))
    with pytest.warns(StillnormWarning):
        sn.freeze(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sn.freeze(net)
        sn.freeze(layers.conv_net())


def test_a_warning_turned_into_an_error_changes_nothing() -> None:
    net = nn.Sequential(layers.make("2d"), nn.BatchNorm2d(4))
    before = Fingerprint(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(StillnormWarning):
            sn.freeze(net)
    assert Fingerprint(net).differences(before) == []


def test_one_estimated_channel_is_enough() -> None:
    """Exactly 0 and 1 in every channel is the initial state; anything else is not."""
    for name in ("running_mean", "running_var"):
        net = nn.Sequential(nn.BatchNorm2d(4))
        getattr(net[0], name)[2] = 0.5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sn.freeze(net)


# ------------------------------------------------------------------------------- again, otherwise


@pytest.mark.parametrize("affine", ["frozen", "trains"])
def test_freezing_twice_is_freezing_once(affine: str) -> None:
    net = layers.conv_net()
    sn.freeze(net, affine=affine)  # type: ignore[arg-type]
    before = Fingerprint(net)
    report = sn.freeze(net, affine=affine)  # type: ignore[arg-type]
    assert report.frozen == ()
    assert report.already_frozen == ("1", "3.1", "6")
    assert Fingerprint(net).differences(before) == []


def test_changing_the_affine_of_a_held_layer() -> None:
    net = layers.conv_net()
    sn.freeze(net)
    assert not any(norm.trains_affine for norm in find_norms(net))
    assert sn.freeze(net, "3", affine="trains").frozen == ("3.1",)
    assert [norm.trains_affine for norm in find_norms(net)] == [False, True, False]
    assert net[3][1].weight.requires_grad


def test_affine_that_did_not_train_does_not_start_to() -> None:
    net = layers.conv_net()
    net[1].requires_grad_(False)
    sn.freeze(net, affine="trains")
    assert not net[1].weight.requires_grad
    assert not find_norms(net)[0].trains_affine


# ------------------------------------------------------------------------------- shared things


def test_a_layer_under_two_names_is_one_layer() -> None:
    """detectron2 and timm replace the first name and leave a live layer under the second."""
    shared = layers.make("2d")
    net = nn.Module()
    net.a = nn.Sequential(shared)
    net.b = shared
    assert sn.freeze(net).frozen == ("a.0",)
    assert net.b is shared
    assert hold_of(net.b) is not None
    assert sn.unfreeze(net, "b").unfrozen == ("a.0",)


def test_affine_shared_between_layers_comes_back_with_the_last() -> None:
    """CycleBatchNormList shares one weight: it trains again once no layer holds it."""
    one, two = layers.make("2d"), layers.make("2d", seed=3)
    two.weight = one.weight
    net = nn.Sequential(one, two)
    before = Fingerprint(net)
    sn.freeze(net)
    assert not one.weight.requires_grad
    sn.unfreeze(net)
    assert one.weight.requires_grad
    assert Fingerprint(net).differences(before) == []


# ------------------------------------------------------------------------------- reports


def test_reports_are_immutable_and_say_what_was_done() -> None:
    net = layers.conv_net()
    report = sn.freeze(net)
    assert str(report).startswith("3 layers frozen")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.frozen = ()  # type: ignore[misc]
    assert "already frozen" in str(sn.freeze(net))
    undone = sn.unfreeze(net, "1")
    assert str(undone).startswith("1 layer unfrozen")
    assert str(sn.unfreeze(net, "1")).startswith("0 layers unfrozen, 1 not held by stillnorm")


def test_the_held_class_is_seen_by_loops_over_class_names() -> None:
    """Thread 000's own loop: classname.find('BatchNorm2d')."""
    net = layers.conv_net()
    sn.freeze(net)
    seen = [m for m in net.modules() if m.__class__.__name__.find("BatchNorm2d") != -1]
    assert seen == [net[1], net[3][1]]


def test_timm_act_layers_keep_their_activation() -> None:
    """detectron2's and transformers' converters drop it without a word."""
    layer = layers.settle(timm.layers.BatchNormAct2d(4))
    sn.freeze(layer)
    assert float(layer(layers.example("2d")).min()) == 0.0
