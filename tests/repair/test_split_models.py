"""What a split model survives: copies, compilers, checkpoints of both kinds, threads."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stillnorm as sn
from repair.splitting import NETS, Loop, Twice, data, in_train_mode
from stillnorm import split_shared
from stillnorm.errors import StateError
from stillnorm.repair import SplitNorm, shared_state_dict
from support.layers import conv_input


@pytest.fixture(params=NETS.values(), ids=NETS)
def net(request: pytest.FixtureRequest) -> nn.Module:
    made: nn.Module = request.param()
    return made


# ------------------------------------------------------------------ what it survives


def test_a_forward_that_is_aborted() -> None:
    net = Twice()
    split_shared(net, data())
    want = in_train_mode(net, data()[0])
    handle = net.q.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        net(data()[0])
    handle.remove()
    assert torch.equal(in_train_mode(net, data()[0]), want)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_are_independent(copied: Callable[[nn.Module], nn.Module]) -> None:
    net = Loop()
    split_shared(net, data())
    want = in_train_mode(net, data()[0])
    other = copied(net)
    assert torch.equal(in_train_mode(other, data()[0]), want)
    assert other.norm.sites[0].weight is other.norm.sites[1].weight
    assert other.norm.sites[0].weight is not net.norm.sites[0].weight
    hook = next(iter(other._forward_pre_hooks.values()))
    assert hook.norm is other.norm


def test_compiled_whole() -> None:
    net = Loop()
    split_shared(net, data())
    x = data()[0]
    want = net.eval()(x)
    torch.testing.assert_close(torch.compile(net, backend="eager", fullgraph=True)(x), want)
    exported = torch.export.export(net, (x,)).module()
    torch.testing.assert_close(exported(x), want)


class Owner(nn.Module):
    """What makes the calls, inside a model that may checkpoint it."""

    def __init__(self, cut: str, *, reentrant: bool) -> None:
        super().__init__()
        self.body, self.cut, self.reentrant = Loop(2), cut, reentrant
        self.first = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.cut == "whole":
            return checkpoint(self.body, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]
        return self.body(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_the_whole_owner(reentrant: bool) -> None:
    net = Owner("whole", reentrant=reentrant)
    split_shared(net, data())
    plain = copy.deepcopy(net)
    plain.cut = ""
    x = data()[0]
    for model in (net, plain):
        model.train()(x).square().sum().backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_a_part_of_the_owner_raises(reentrant: bool) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = checkpoint(lambda x: self.norm(self.conv(x)), x, use_reentrant=reentrant)
            return x

    net = Part()
    split_shared(net, data())
    x = data()[0].requires_grad_()
    with pytest.raises(StateError, match=r"norm: a part of the forward .* computed again"):
        net.train()(x).sum().backward()


def test_more_calls_raise_and_fewer_do_not() -> None:
    net = Loop(3)
    split_shared(net, data())
    net.times = 4
    with pytest.raises(StateError, match="norm: call 4 of 3 in one forward"):
        net(data()[0])
    net.times = 2
    net(data()[0])
    net.times = 3
    net(data()[0])


def test_calls_from_elsewhere_raise() -> None:
    net = nn.Sequential(Twice(), nn.ReLU())
    split_shared(net, data())
    x = data()[0]
    for _ in range(2):
        with pytest.raises(StateError, match="called from outside the module whose forward"):
            net[0].norm(x)
        net(x)
    net[0](x)


def test_half_and_device_casts_keep_the_sharing() -> None:
    net = Loop()
    split_shared(net, data())
    net.double()
    assert net.norm.sites[0].weight is net.norm.sites[2].weight
    assert net(data()[0].double()).dtype == torch.float64


def test_two_threads_do_not_mix_their_calls() -> None:
    net = Twice()
    split_shared(net, data())
    inside, go = threading.Event(), threading.Event()
    first = True

    def wait(*_: Any) -> None:
        nonlocal first
        if first:
            first = False
            inside.set()
            go.wait(10)

    net.q.register_forward_hook(wait)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            net(data()[0])
        except StateError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    inside.wait(10)
    net(data()[1])
    go.set()
    thread.join()
    assert "two threads" in str(errors[0])


def test_what_is_set_on_the_layer_is_set_on_its_norms() -> None:
    net = Loop()
    split_shared(net, data())
    net.norm.momentum, net.norm.training = 0.5, False
    net.norm.reset_running_stats()
    for site in net.norm.sites:
        assert (site.momentum, site.training) == (0.5, False)
        assert not site.running_mean.any()
    assert net.norm.momentum == 0.5


def test_hooks_are_the_users_own() -> None:
    net = Loop()
    seen: list[nn.Module] = []

    class Recorder:
        def note(self, module: nn.Module, *_: Any) -> None:
            self.last = module
            seen.append(module)

    recorder = Recorder()
    net.norm.register_forward_hook(recorder.note)
    split_shared(net, data())
    seen.clear()
    net(data()[0])
    assert seen == list(net.norm.sites)
    assert recorder.last is net.norm.sites[2]


# ------------------------------------------------------------------ checkpoints


def test_a_checkpoint_from_before_loads(net: nn.Module) -> None:
    old = copy.deepcopy(net.state_dict())
    split_shared(net, data())
    net.load_state_dict(old, strict=True)
    for path, module in net.named_modules():
        if isinstance(module, SplitNorm):
            for site in module.sites:
                assert torch.equal(site.running_mean, old[f"{path}.running_mean"])


def test_a_checkpoint_of_its_own_loads() -> None:
    net, other = Loop(), Loop()
    split_shared(net, data())
    split_shared(other, [7 * x for x in data()])
    other.load_state_dict(net.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), other.buffers(), strict=True))


def test_its_state_loads_into_the_model_of_before(net: nn.Module) -> None:
    old = copy.deepcopy(net)
    split_shared(net, data())
    state = shared_state_dict(net)
    assert list(state) == list(old.state_dict())
    old.load_state_dict(state, strict=True)
    assert all(map(torch.equal, old.parameters(), net.parameters()))


def test_shared_again_the_statistics_are_those_of_all_calls() -> None:
    x = conv_input(16)
    net, pooled = Loop(), Loop()
    split_shared(net, x)
    sn.recalibrate(pooled, x)
    state = shared_state_dict(net)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(
            state[f"norm.{name}"], pooled.state_dict()[f"norm.{name}"], rtol=1e-3, atol=1e-5
        )


def test_private_parameters_cannot_be_shared_again() -> None:
    net = Loop()
    split_shared(net, data(), affine="private")
    assert shared_state_dict(net), "they are still the same"
    with torch.no_grad():
        net.norm.sites[1].weight.add_(1)
    with pytest.raises(StateError, match="each their own weight"):
        shared_state_dict(net)


def test_a_checkpoint_that_is_assigned_keeps_the_norms_apart_and_the_parameters_together() -> None:
    net = Loop()
    old = {k: v.clone() for k, v in net.state_dict().items()}
    split_shared(net, data())
    net.load_state_dict(old, assign=True)
    first, second, third = net.norm.sites
    assert first.weight is second.weight is third.weight
    pointers = {site.running_mean.data_ptr() for site in net.norm.sites}
    assert len(pointers) == 3
    assert len(list(net.parameters())) == 4


def test_missing_keys_are_still_missed() -> None:
    net = Loop()
    split_shared(net, data())
    state = net.state_dict()
    del state["norm.sites.1.running_var"]
    with pytest.raises(RuntimeError, match=r"norm\.sites\.1\.running_var"):
        net.load_state_dict(state)
