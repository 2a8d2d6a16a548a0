"""One norm per call: train mode as it was, eval as train mode, everything else untouched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stillnorm as sn
from repair.splitting import NETS, Levels, Loop, Twice, data, in_train_mode, names
from stillnorm import split_shared
from stillnorm.errors import BatchError, CalibrationError, StateError
from stillnorm.repair import SplitNorm, calls, split, surgery
from support.fingerprint import Fingerprint
from support.interruptions import Interruption
from support.layers import conv_input
from support.oracles import pooled_moments
from support.tolerances import STATISTICS_RTOL


@pytest.fixture(params=NETS.values(), ids=NETS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    made: nn.Module = request.param()
    return made


# ------------------------------------------------------------------ what it does


def test_eval_becomes_what_train_mode_is(net: nn.Module) -> None:
    x = conv_input(32)
    sn.recalibrate(net, x)
    want = in_train_mode(net, x)
    assert (net.eval()(x) - want).abs().max() > 0.3, "the near miss: shared, they differ"
    report = split_shared(net, x)
    assert len(report.split) == 1
    torch.testing.assert_close(net.eval()(x), want, rtol=0.02, atol=0.05)


def test_train_mode_is_the_same_bit_for_bit(net: nn.Module) -> None:
    before = [in_train_mode(net, x) for x in data()]
    split_shared(net, data())
    for x, want in zip(data(), before, strict=True):
        assert torch.equal(in_train_mode(net, x), want)


def test_every_norm_has_the_moments_of_its_own_call() -> None:
    net = Loop()
    split_shared(net, data())
    received: list[Tensor] = []
    with sn.preserved(net), torch.no_grad():
        for site in net.norm.sites:
            site.register_forward_pre_hook(lambda module, args: received.append(args[0].clone()))
        net.train()
        for x in data():
            net(x)
    for i, site in enumerate(net.norm.sites):
        mean, var = pooled_moments(received[i::3])
        torch.testing.assert_close(site.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(site.running_var.double(), var, rtol=STATISTICS_RTOL, atol=0)


def test_other_layers_keep_theirs() -> None:
    net = Twice()
    before = {k: v.clone() for k, v in net.once.state_dict().items()}
    split_shared(net, data())
    assert all(torch.equal(v, before[k]) for k, v in net.once.state_dict().items())


def test_gradients_are_those_from_before(net: nn.Module) -> None:
    x, twin = conv_input(8), copy.deepcopy(net)
    split_shared(net, data())
    for model in (net, twin):
        model.train()(x).square().sum().backward()
    params = dict(twin.named_parameters())
    assert len(params) == len(list(net.parameters()))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-6)


def test_parameters_are_the_same_objects_or_private() -> None:
    net = Loop()
    weight = net.norm.weight
    split_shared(net, data())
    assert all(site.weight is weight for site in net.norm.sites)
    assert net.norm.weight is weight
    assert len(list(net.parameters())) == 4
    private = Loop()
    weight = private.norm.weight
    split_shared(private, data(), affine="private")
    first, *others = private.norm.sites
    assert first.weight is weight
    assert all(torch.equal(site.weight, weight) and site.weight is not weight for site in others)


def test_one_registration_each_becomes_a_plain_norm() -> None:
    net = names()
    report = split_shared(net, data())
    assert report.split[0].paths == ("0", "2", "3.1")
    assert report.split[0].norms == 3
    found = [net[0], net[2], net[3][1]]
    assert [type(norm) for norm in found] == [nn.BatchNorm2d] * 3
    assert len(set(map(id, found))) == 3


def test_repeated_calls_are_counted_by_the_smallest_module_around_them() -> None:
    net = Levels()
    split_shared(net, data())
    assert isinstance(net.head[1], SplitNorm)
    assert len(net._forward_pre_hooks) == 1, "each call of the head is one forward of the head"
    assert not net.head._forward_pre_hooks
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), Loop(2))
    split_shared(inner, data())
    assert len(inner[1]._forward_pre_hooks) == 1
    assert not inner._forward_pre_hooks


def test_a_subclass_keeps_its_activation() -> None:
    from support.zoo import timm

    net = Loop()
    net.norm = timm.layers.BatchNormAct2d(3)
    want = in_train_mode(net, data()[0])
    split_shared(net, data())
    assert all(type(site) is timm.layers.BatchNormAct2d for site in net.norm.sites)
    assert torch.equal(in_train_mode(net, data()[0]), want)


def test_check_is_content() -> None:
    net, x = Twice(), conv_input(64)
    assert "SN201" in [f.code for f in sn.check(net, iter([x, conv_input(64, seed=1)])).findings]
    split_shared(net, x)
    assert "SN201" not in [f.code for f in sn.check(net, iter([x, x])).findings]


def test_the_other_operations_see_the_new_norms() -> None:
    net = Twice()
    split_shared(net, data())
    assert [layer.path for layer in sn.inspect(net).layers] == [
        "norm.sites.0", "norm.sites.1", "once",
    ]  # fmt: skip
    sn.freeze(net, "norm")
    assert sn.is_frozen(net, "norm")
    x = conv_input()
    net.train()
    net.once.eval()
    out = net(x)
    assert torch.equal(out, net.eval()(x))


# ------------------------------------------------------------------ what is refused


def test_a_module_that_calls_itself() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor, depth: int = 2) -> Tensor:
            x = self.norm(3 * x + 5 * depth)
            return self(x.relu(), depth - 1) if depth else x

    report = split_shared(Recursive(), data())
    assert report.split == ()
    assert report.refused == (("norm", "is called by a module that calls itself"),)


def test_a_class_that_copies_itself_in_its_own_way() -> None:
    class Copies(nn.BatchNorm2d):
        def __deepcopy__(self, memo: Any) -> nn.Module:
            made = type(self)(self.num_features)
            made.load_state_dict(self.state_dict())
            return made

    net = Loop()
    net.norm = Copies(3)
    before = Fingerprint(net)
    with pytest.raises(StateError, match="does not keep its parameters"):
        split_shared(net, data())
    assert not Fingerprint(net).differences(before)


def test_a_norm_in_a_plain_list_is_named() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.all = [self.norm] * 2

        def forward(self, x: Tensor) -> Tensor:
            return self.all[1](3 * self.all[0](x).relu())

    net = Listed()
    before = Fingerprint(net, versions=False)
    report = split_shared(net, data())
    assert report.split == ()
    ((path, reason),) = report.refused
    assert path == "norm"
    assert "plain list" in reason
    assert net.norm is net.all[0]
    assert not Fingerprint(net, versions=False).differences(before)


def test_held_layers_layers_without_statistics_and_layers_called_once() -> None:
    held, bare, single = Loop(), Loop(), nn.Sequential(nn.BatchNorm2d(3))
    sn.freeze(held)
    bare.norm = nn.BatchNorm2d(3, track_running_stats=False)
    assert "is held" in split_shared(held, data()).refused[0][1]
    assert "no running statistics" in split_shared(bare, data()).refused[0][1]
    report = split_shared(single, data())
    assert report.split == report.refused == ()


def test_calls_in_several_forwards_of_the_model() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3))
    report = split_shared(net, data(), forward=lambda net, x: (net(x), net(3 * x)))
    assert report.split == ()
    assert "which nothing encloses" in report.refused[0][1]


def test_only_the_layers_named() -> None:
    net = nn.ModuleDict({"a": Loop(), "b": Loop()})
    seq = nn.Sequential(net["a"], net["b"])
    report = split_shared(seq, data(), "0")
    assert [one.path for one in report.split] == ["0.norm"]
    assert type(seq[1].norm) is nn.BatchNorm2d


def test_a_model_that_tells_its_norms_apart() -> None:
    class Compares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(5 * self.a(x)) + (self.a is self.b)

    net = Compares()
    before = Fingerprint(net)
    with pytest.raises(StateError, match="computes something else in train mode"):
        split_shared(net, data())
    assert not Fingerprint(net).differences(before)
    assert net.a is net.b


def test_outputs_of_integers_are_compared_too() -> None:
    class Classes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = self.b = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(5 * self.a(x)).argmax(1) + (self.a is self.b)

    net = Classes()
    x = data()
    before = Fingerprint(net)
    with pytest.raises(StateError, match="computes something else in train mode"):
        split_shared(net, x)
    assert not Fingerprint(net).differences(before)


# ------------------------------------------------------------------ all or nothing


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("where", "name", "nth"),
    [
        (split, "twin", 1),
        (split, "twin", 2),
        (split, "SplitNorm", 1),
        (split, "SplitNorm", 2),
        (split, "recalibrate", 1),
        (split, "_must_agree", 1),
        (split, "_run", 2),
        (split, "_run", 3),
        (surgery.Surgery, "set_child", 1),
        (surgery.Surgery, "set_child", 2),
        (surgery.Surgery, "set_child", 4),
        (surgery.Surgery, "add_pre_hook", 1),
        (surgery.Surgery, "add_pre_hook", 2),
        (calls.CallCounter, "counting", 3),
        (split.Split, "__init__", 1),
        (split.SplitReport, "__init__", 1),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_error_at_any_step_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch,
    kind: type[BaseException],
    where: Any,
    name: str,
    nth: int,
    when: str,
) -> None:
    net = nn.Sequential(Loop(2), Twice())
    hook = net[0].register_forward_pre_hook(lambda *_: None)
    before, modules = Fingerprint(net, versions=False), list(net.modules())
    interruption = Interruption(monkeypatch, where, name, nth, kind, before=when == "before")
    with pytest.raises(kind):
        split_shared(net, data())
    monkeypatch.undo()
    assert interruption.calls >= nth
    assert not Fingerprint(net, versions=False).differences(before)
    assert list(net.modules()) == modules
    assert list(net[0]._forward_pre_hooks) == [hook.id]


def test_bad_data_leaves_no_trace() -> None:
    for bad, kind in (
        ([data()[0], data()[1] * float("nan")], CalibrationError),
        (iter([data()[0], data()[1].repeat(1, 2, 1, 1)]), BatchError),
    ):
        net = Loop()
        before = Fingerprint(net, versions=False)
        with pytest.raises(kind):
            split_shared(net, bad)
        assert not Fingerprint(net, versions=False).differences(before)


def test_no_batch_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="no batch"):
        split_shared(Loop(), [])


def test_a_later_batch_with_more_calls_is_named() -> None:
    class Varying(Loop):
        def forward(self, x: Tensor) -> Tensor:
            self.times = 2 if len(x) > 5 else 3
            return super().forward(x)

    net = Varying()
    before = Fingerprint(net, versions=False)
    with pytest.raises(StateError, match="batch 1: norm: call 3 of 2"):
        split_shared(net, data())
    assert list(net.norm.state_dict()) == list(nn.BatchNorm2d(3).state_dict())
    del before


def test_undo(net: nn.Module) -> None:
    before, modules = Fingerprint(net, versions=False), list(net.modules())
    report = split_shared(net, data())
    report.undo()
    assert not Fingerprint(net, versions=False).differences(before)
    assert list(net.modules()) == modules
    report.undo()
    assert list(net.modules()) == modules


def test_undo_leaves_the_mode_and_other_hooks_as_they_are_now() -> None:
    net = nn.Sequential(Loop(2), Twice()).train()
    first = split_shared(net, data(), "0")
    second = split_shared(net, data(), "1")
    hook = net[0].register_forward_pre_hook(lambda *_: None)
    net.eval()
    first.undo()
    hook.remove()
    second.undo()
    assert not net[0].norm.training
    assert not net[0]._forward_pre_hooks
    assert not net[1]._forward_pre_hooks


def test_batches_from_an_iterator_are_read_once() -> None:
    def loader() -> Iterator[Tensor]:
        yield from data()

    net = Loop()
    report = split_shared(net, loader())
    assert report.recalibration is not None
    assert report.recalibration.batches == 3
    assert "norm" in str(report)
    assert report.to_json()
