"""Replacing norms: the same function where it is promised, nothing lost unsaid, all or nothing."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune

import stillnorm as sn
from repair.replacing import (
    OWN,
    PLAIN,
    around,
    exact,
    no_differences,
)
from stillnorm.errors import RepairError, SelectorError
from stillnorm.norms import hold_of
from stillnorm.repair import replace
from stillnorm.repair.kinds import KINDS, WAS
from support import layers
from support.fingerprint import Fingerprint
from support.layers import conv_input, conv_net, settle
from support.zoo import torchvision

# ------------------------------------------------------------------ sync, and back


@pytest.mark.parametrize("name", PLAIN)
def test_sync_and_back_are_the_same_bit_for_bit(name: str) -> None:
    layer, x = layers.make(name), layers.example(name)
    net = around(layer)
    before, tensors = exact(net, x), dict(layer.state_dict(keep_vars=True))
    kind, settings_ = type(layer), {k: getattr(layer, k) for k in ("eps", "momentum", "affine")}
    assert replace(net, "sync").replaced[0].lost == ""
    assert type(net[0]) is nn.SyncBatchNorm
    assert torch.equal(exact(net, x), before)
    replace(net, "batch")
    assert type(net[0]) is kind
    assert net[0] is not layer
    assert WAS not in vars(net[0])
    assert torch.equal(exact(net, x), before)
    assert {k: getattr(net[0], k) for k in settings_} == settings_
    for key, tensor in net[0].state_dict(keep_vars=True).items():
        assert tensor is tensors[key]
    train = copy.deepcopy(layer).train()(x)
    assert torch.equal(net.train()(x), train)


@pytest.mark.parametrize("affine", ["frozen", "trains"])
def test_a_held_layer_stays_held(affine: Any) -> None:
    net, x = conv_net().train(), conv_input()
    sn.freeze(net, affine=affine)
    want = net(x)
    report = replace(net, "sync")
    assert report.replaced[0].before == "HeldBatchNorm2d"
    assert report.replaced[0].after == "HeldSyncBatchNorm"
    assert report.replaced[0].lost == ""
    assert sn.is_frozen(net)
    assert torch.equal(net.train()(x), want)
    replace(net, "batch")
    assert sn.is_frozen(net)
    assert torch.equal(net.train()(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(net)).train()(x), want)
    sn.unfreeze(net)
    assert type(net[1]) is nn.BatchNorm2d
    assert net[1].training
    assert net[1].weight.requires_grad


def test_the_hold_is_a_record_of_its_own() -> None:
    """Unfreezing the new layer must not unfreeze what `undo` puts back."""
    net = conv_net()
    sn.freeze(net)
    report = replace(net, "sync", "1")
    sn.unfreeze(net, "1")
    report.undo()
    assert hold_of(net[1]) is not None
    assert hold_of(net[1]).required_grad == {"weight": True, "bias": True}


def test_what_torchs_converter_loses() -> None:
    """A timm activation, a hold, hooks, a user's attribute (torch 2.13)."""
    calls: list[str] = []

    def make() -> nn.Sequential:
        net = nn.Sequential(layers.timm_norm_act(act_layer=nn.SiLU), layers.make("2d"))
        settle(net)
        sn.freeze(net, "1")
        net[0].register_forward_hook(lambda *_: calls.append("forward"))
        net[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
        net[0].register_full_backward_hook(lambda *_: calls.append("backward"))
        net[0].tag = "mine"
        return net

    x = layers.example("2d")
    theirs = nn.SyncBatchNorm.convert_sync_batchnorm(make())
    assert not torch.allclose(exact(theirs, x), exact(make(), x))
    assert hold_of(theirs[1]) is None
    calls.clear()
    net = make()
    want = exact(net, x)
    replace(net, "sync")
    calls.clear()
    y = net.eval()(x)
    y.sum().backward()
    assert torch.equal(y, want)
    assert calls == ["pre", "forward", "backward"]
    assert net[0].tag == "mine"
    assert hold_of(net[1]) is not None
    assert type(net[0]).__name__ == "SyncBatchNormAct"


def test_mmengines_and_lightnings_revert_forget_the_mode() -> None:
    net = conv_net().train()
    net[1].eval()
    replace(net, "sync")
    assert (net[1].training, net[6].training) == (False, True)
    replace(net, "batch")
    assert (net[1].training, net[6].training) == (False, True)
    assert type(net[1]) is nn.BatchNorm2d
    assert type(net[6]) is nn.BatchNorm1d


def test_handles_of_hooks_remove_them_from_the_new_layer() -> None:
    net = conv_net()
    handle = net[1].register_forward_hook(lambda *_: None)
    report = replace(net, "sync")
    handle.remove()
    assert not net[1]._forward_hooks
    report.undo()
    assert not net[1]._forward_hooks


def test_a_hook_that_gets_the_module_gets_the_new_one() -> None:
    seen: list[nn.Module] = []
    net = conv_net()
    net[1].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    state = net.state_dict()
    replace(net, "sync")
    net.load_state_dict(state)
    assert seen == [net[1]]


def test_a_compiled_layer_does_not_call_the_old_one() -> None:
    net, x = conv_net().eval(), conv_input()
    net[1].compile(backend="eager")
    want = net(x)
    replace(net, "sync")
    net[1].eps = 7.0
    assert not torch.equal(net(x), want)


def test_an_optimizer_goes_on() -> None:
    net, twin = conv_net(), conv_net()
    optimizer, other = (torch.optim.SGD(m.parameters(), 0.1, momentum=0.9) for m in (net, twin))
    for step in range(3):
        if step == 1:
            replace(net, "sync")
        if step == 2:
            replace(net, "batch")
        for model, opt in ((net, optimizer), (twin, other)):
            opt.zero_grad()
            model.train()(conv_input(seed=step)).square().sum().backward()
            opt.step()
    for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_syncbatchnorm_of_unknown_origin_needs_a_dimension() -> None:
    net = nn.Sequential(nn.Conv3d(1, 2, 1), nn.SyncBatchNorm(2))
    ((_, reason),) = replace(net, "batch").refused
    assert '"batch3d"' in reason
    assert "two-dimensional" in replace(net, "frozen").refused[0][1]
    report = replace(net, "batch3d")
    assert type(net[1]) is nn.BatchNorm3d
    assert replace(net, "batch3d").already == ("1",)
    assert "is a BatchNorm3d" in replace(net, "batch2d").refused[0][1]
    report.undo()
    other = conv_net()
    replace(other, "sync")
    assert dict(replace(other, "batch1d").refused)["1"] == "was a BatchNorm2d"


def test_process_groups_are_named() -> None:
    net = nn.Sequential(nn.SyncBatchNorm(2, process_group=(group := object())))
    assert replace(net, "batch2d").replaced[0].lost == "process_group"
    assert group is not None


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", ["sync", "affine", "frozen", "group", "layer"])
def test_classes_with_a_forward_of_their_own_are_refused(name: str, kind: str) -> None:
    if name == "sync super().forward" and kind == "sync":
        kind = "batch2d"
    net = around(layers.make(name))
    before = Fingerprint(net)
    report = replace(net, kind)
    assert report.replaced == ()
    assert "of its own, which would be lost" in report.refused[0][1]
    assert not Fingerprint(net).differences(before)


# ------------------------------------------------------------------ group and layer norm


@pytest.mark.parametrize(
    ("channels", "kind", "groups"),
    [
        (256, nn.BatchNorm2d, 32),
        (64, nn.BatchNorm2d, 32),
        (48, nn.BatchNorm2d, 16),
        (24, nn.BatchNorm3d, 8),
        (6, nn.BatchNorm2d, 2),
        (7, nn.BatchNorm2d, 1),
        (3, nn.BatchNorm2d, 1),
        (256, nn.BatchNorm1d, 32),
        (64, nn.BatchNorm1d, 8),
        (12, nn.BatchNorm1d, 1),
    ],
)
def test_number_of_groups(channels: int, kind: type[nn.Module], groups: int) -> None:
    net = around(kind(channels))
    replace(net, "group")
    assert (net[0].num_groups, net[0].num_channels) == (groups, channels)


@pytest.mark.parametrize("name", [n for n in PLAIN if n != "subclass"] + ["sync", "subclass"])
def test_group_keeps_the_parameters_and_says_what_is_lost(name: str) -> None:
    layer, x = layers.make(name), layers.example(name)
    net = around(layer)
    lost = replace(net, "group").replaced[0].lost
    new = net[0]
    assert type(new) is nn.GroupNorm
    assert new.weight is layer.weight
    assert new.bias is layer.bias
    assert (new.eps, new.affine) == (layer.eps, layer.affine)
    torch.testing.assert_close(
        net(x), F.group_norm(x, new.num_groups, layer.weight, layer.bias, layer.eps)
    )
    words = ["what it computes in eval mode", "running statistics", "num_batches_tracked"]
    words += ["momentum"] if layer.momentum is not None else []
    assert sorted(lost.split(", ")) == sorted(words)


def test_layer_norm_is_over_the_whole_sample() -> None:
    rows, maps = layers.make("1d-flat"), layers.make("2d")
    net = nn.ModuleDict({"rows": rows, "maps": maps})
    replace(net, "layer")
    x = layers.example("1d-flat")
    want = F.layer_norm(x, (4,), rows.weight, rows.bias, rows.eps)
    torch.testing.assert_close(net["rows"](x), want)
    x = layers.example("2d")
    want = F.layer_norm(x, x.shape[1:], eps=maps.eps)
    want = want * maps.weight.view(-1, 1, 1) + maps.bias.view(-1, 1, 1)
    torch.testing.assert_close(net["maps"](x), want)


def test_group_keeps_hooks_mode_and_timms_activation() -> None:
    calls: list[int] = []
    net = nn.Sequential(layers.timm_norm_act(act_layer=nn.SiLU)).eval()
    settle(net)
    act, weight = net[0].act, net[0].weight
    net[0].register_forward_hook(lambda *_: calls.append(1))
    replace(net, "group")
    assert net[0].act is act
    assert net[0].weight is weight
    assert not net[0].training
    x = layers.example("2d")
    torch.testing.assert_close(
        net(x), F.silu(F.group_norm(x, 2, net[0].weight, net[0].bias, net[0].eps))
    )
    assert calls == [1]


def test_group_of_held_and_foreign_layers_is_refused() -> None:
    net = nn.Sequential(layers.make("2d"), torchvision.ops.FrozenBatchNorm2d(4))
    sn.freeze(net)
    reasons = dict(replace(net, "group").refused)
    assert "sn.unfreeze it first" in reasons["0"]
    assert '"batch" first' in reasons["1"]


# ------------------------------------------------------------------ callables


def test_a_callable_makes_the_module() -> None:
    net = conv_net().eval()
    parameter = net[1].weight
    report = replace(net, lambda norm: nn.Sequential(norm, nn.GELU()), "1")
    assert type(net[1]) is nn.Sequential
    assert net[1][0].weight is parameter
    assert not net[1].training, "mmengine forgets the mode"
    assert report.replaced[0].lost == ""
    report = replace(net, lambda norm: nn.Identity(), "3")
    assert report.replaced[0].lost == (
        "weight and bias as parameters, running statistics, momentum, num_batches_tracked"
    )
    assert not net[3][1].training


def test_a_callable_may_leave_layers_and_see_all_norms() -> None:
    net = nn.Sequential(nn.InstanceNorm2d(4), layers.make("own formula"), layers.make("2d"))
    report = replace(net, lambda norm: None if type(norm) is nn.BatchNorm2d else nn.Identity())
    assert [one.path for one in report.replaced] == ["0", "1"]
    assert report.refused == (("2", "the callable returned None for it"),)
    assert "only a callable" in replace(nn.Sequential(nn.InstanceNorm2d(4)), "group").refused[0][1]


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda norm: norm, RepairError),
        (lambda norm: 3, RepairError),
        (lambda norm: 1 / 0, ZeroDivisionError),
    ],
)
def test_a_bad_callable_changes_nothing(make: Any, error: type[Exception]) -> None:
    net = conv_net()
    before = Fingerprint(net)
    with pytest.raises(error):
        replace(net, lambda norm: nn.Identity() if norm is net[1] else make(norm))
    assert not Fingerprint(net).differences(before)


def test_a_callable_may_put_one_module_everywhere() -> None:
    shared = nn.Identity()
    net = conv_net()
    replace(net, lambda norm: shared)
    assert net[1] is net[3][1] is shared


# ------------------------------------------------------------------ which layers, and where


@pytest.mark.parametrize("kind", ["sync", "affine", "group", "frozen"])
def test_one_module_under_several_names_stays_one(kind: str) -> None:
    """timm, torch and transformers replace the first name only."""
    norm = layers.make("2d")
    net = nn.Sequential(norm, nn.ReLU(), nn.Sequential(norm, nn.ModuleDict({"a": norm})))
    net.register_module("again", norm)
    before = Fingerprint(net)
    report = replace(net, kind)
    (one,) = report.replaced
    assert one.paths == ("0", "2.0", "2.1.a", "again")
    assert net[0] is net[2][0] is net[2][1]["a"] is net.again
    assert net[0] is not norm
    report.undo()
    assert net[0] is net[2][0] is net[2][1]["a"] is net.again is norm
    assert not Fingerprint(net).differences(before)


def test_tied_parameters_stay_tied() -> None:
    net = nn.Sequential(layers.make("2d"), layers.make("2d"))
    net[1].weight = net[0].weight
    replace(net, "sync")
    assert net[0].weight is net[1].weight
    replace(net, "group")
    assert net[0].weight is net[1].weight


def test_the_root_is_refused_with_the_line_to_write() -> None:
    model = layers.make("2d")
    x = layers.example("2d")
    want = exact(model, x)
    report = replace(model, "sync")
    assert report.replaced == ()
    ((path, reason),) = report.refused
    assert path == ""
    names: dict[str, Any] = {"model": model, "nn": nn, "sn": Public}
    exec(reason.partition(": ")[2], names)
    assert type(names["model"]) is nn.SyncBatchNorm
    assert torch.equal(exact(names["model"], x), want)


class Public:
    replace = staticmethod(replace)


def test_plain_lists_and_attributes_are_named() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (layers.make("2d") for _ in range(3))
            self.all = [{"first": self.a}, None]
            object.__setattr__(self, "alias", self.b)

    net = Net()
    report = replace(net, "sync")
    reasons = dict(report.refused)
    assert "is also in Net.all, past its registration" in reasons["a"]
    assert "is also in Net.alias" in reasons["b"]
    assert [one.path for one in report.replaced] == ["c"]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_layers_that_no_kind_can_replace() -> None:
    pruned = prune.l1_unstructured(layers.make("2d"), "weight", 1)
    parametrized = layers.make("2d")
    parametrize.register_parametrization(parametrized, "weight", Doubled())
    patched, scripted = layers.make("2d"), torch.jit.script(layers.make("2d"))
    patched.forward = patched.forward
    net = nn.ModuleDict(
        {
            "pruned": pruned,
            "parametrized": parametrized,
            "patched": patched,
            "scripted": scripted,
            "lazy": nn.LazyBatchNorm2d(),
        }
    )
    for kind in KINDS:
        report = replace(net, kind)
        assert report.replaced == ()
        if not report.already:
            words = ["computed", "parametriz", "replaced on the instance", "TorchScript", "lazy"]
            for (path, reason), word in zip(report.refused, words, strict=True):
                assert word in reason, path
    callable_ = replace(net, lambda norm: nn.Identity())
    assert [one.path for one in callable_.replaced] == ["patched"]


def test_the_selector_and_the_kind_are_checked_first() -> None:
    net = conv_net()
    replace(net, "sync", "3")
    assert (type(net[1]), type(net[3][1])) == (nn.BatchNorm2d, nn.SyncBatchNorm)
    with pytest.raises(SelectorError):
        replace(net, "sync", "nothing")
    with pytest.raises(RepairError, match=r"no kind 'gruop'\n  help: one of group, layer, affine"):
        replace(net, "gruop")
    empty = replace(nn.Sequential(nn.Linear(2, 2)), "sync")
    assert empty.replaced == empty.refused == empty.already == ()


def test_what_is_of_the_kind_already_is_left() -> None:
    net = conv_net()
    replace(net, "sync", "1")
    again = replace(net, "sync")
    assert again.already == ("1",)
    assert [one.path for one in again.replaced] == ["3.1", "6"]
    assert replace(conv_net(), "batch").already == ("1", "3.1", "6")
    assert replace(around(layers.timm_norm_act()), "batch").already == ("0",)


def test_layers_without_statistics() -> None:
    net = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    x = layers.example("2d")
    assert "no running statistics" in replace(net, "affine").refused[0][1]
    want = exact(net, x)
    replace(net, "sync")
    assert torch.equal(exact(net, x), want)
    replace(net, "batch")
    assert torch.equal(exact(net, x), want)
    assert "running" not in replace(net, "group").replaced[0].lost


def test_a_model_inside_data_parallel_wrappers() -> None:
    net = nn.DataParallel(conv_net())
    assert [one.path for one in replace(net, "sync").replaced] == ["1", "3.1", "6"]
    assert type(net.module[1]) is nn.SyncBatchNorm


def test_convolutions_of_a_folded_norm_become_plain() -> None:
    net, x = conv_net().train(), conv_input()
    sn.freeze(net, fold_on=x, fold_when="always")
    want = net(x)
    before = Fingerprint(net, versions=False)
    report = replace(net, "sync")
    assert type(net[0]) is not nn.Conv2d
    torch.testing.assert_close(net(x), want)
    report.undo()
    report = replace(net, "affine")
    assert type(net[0]) is nn.Conv2d
    torch.testing.assert_close(net(x), want, rtol=1e-5, atol=1e-5)
    report.undo()
    no_differences(net, before)
    torch.testing.assert_close(net(x), want)


# ------------------------------------------------------------------ the report


def test_the_report() -> None:
    net = nn.Sequential(conv_net(), nn.BatchNorm2d(4, track_running_stats=False))
    report = replace(net, "affine")
    text = str(report)
    assert text.startswith("3 layers replaced")
    assert "0.1, 0.3.1" in text
    assert "AffineNorm" in text
    assert "no running statistics" in text
    data = json.loads(report.to_json())
    assert data["replaced"][0]["path"] == "0.1"
    assert data["replaced"][0]["before"] == "BatchNorm2d"
    assert data["refused"][0][0] == "1"
    assert "1 of that kind already" in str(replace(around(nn.SyncBatchNorm(3)), "sync"))
    with pytest.raises(AttributeError):
        report.replaced = ()  # type: ignore[misc]
