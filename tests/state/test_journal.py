"""`put_back`: after any training step, model, optimizer and all the rest are as they were."""

from __future__ import annotations

import collections
import contextlib
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import lr_scheduler, swa_utils
from torch.utils.checkpoint import checkpoint

import stillnorm as sn
from stillnorm.state import put_back
from support import layers
from support.fingerprint import Fingerprint


class Stop(Exception):
    pass


ENDINGS: list[type[BaseException] | None] = [None, Stop, KeyboardInterrupt]

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "Adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=2),
}


class Shadow:
    """An average of weights as people write it: a plain class with a `state_dict`."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {k: v.detach().clone() for k, v in model.named_parameters()}
        self.updates = 0
        self.recent: collections.deque[int] = collections.deque(maxlen=2)

    def update(self, model: nn.Module) -> None:
        self.updates += 1
        self.recent.append(self.updates)
        for name, value in model.named_parameters():
            self.shadow[name].mul_(0.9).add_(value.detach(), alpha=0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("nobody needs to load what is put back in place")


class Slotted:
    """What can only be asked for its state."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 3

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Setup:
    """A model and everything that trains it."""

    def __init__(self, optimizer: str = "Adam", seed: int = 1) -> None:
        self.model = layers.conv_net(seed).train()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = lr_scheduler.SequentialLR(
            self.optimizer,
            [
                lr_scheduler.LinearLR(self.optimizer, total_iters=2),
                lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=5),
            ],
            milestones=[2],
        )
        self.plateau = lr_scheduler.ReduceLROnPlateau(self.optimizer, patience=0)
        self.scaler = torch.amp.GradScaler("cpu")
        self.average = swa_utils.AveragedModel(
            self.model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        self.shadow = Shadow(self.model)

    @property
    def others(self) -> list[object]:
        return [self.optimizer, self.scheduler, self.plateau, self.scaler, self.shadow]

    def step(self, x: Tensor | None = None) -> None:
        x = layers.conv_input() if x is None else x

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.model(F.dropout(x, 0.1)).square().mean()
            loss.backward()
            return loss

        if isinstance(self.optimizer, torch.optim.LBFGS):
            loss = self.optimizer.step(closure)
        else:
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model(F.dropout(x, 0.1)).square().mean()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.scheduler.step()
        self.plateau.step(float("inf"))
        self.average.update_parameters(self.model)
        self.shadow.update(self.model)

    def fingerprint(self) -> Fingerprint:
        return fingerprint(self.model, self.average, *self.others)


def fingerprint(*things: object) -> Fingerprint:
    """Everything there is to see of modules and of other objects' attributes."""
    holder = nn.Module()
    for index, thing in enumerate(things):
        setattr(holder, f"_{index}", thing if isinstance(thing, nn.Module) else vars(thing))
    seen = Fingerprint(holder)
    seen.seen = {k: v for k, v in seen.seen.items() if re.match(r"\.?_\d|random", k)}
    for name, parameter in holder.named_parameters():
        seen.seen[f"{name} hooks"] = tuple(parameter._backward_hooks or ())
    return seen


@contextlib.contextmanager
def unchanged(*things: object) -> Iterator[None]:
    before = fingerprint(*things)
    yield
    assert fingerprint(*things).differences(before) == []


@pytest.mark.parametrize("warm", [0, 1, 3], ids=["cold", "warm", "hot"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_leaves_no_trace(name: str, warm: int) -> None:
    setup = Setup(name)
    for i in range(warm):
        setup.step(layers.conv_input(seed=i))
    before = setup.fingerprint()
    with put_back(setup.model, setup.average, *setup.others):
        setup.step()
        assert setup.fingerprint().differences(before)
        setup.step(layers.conv_input(seed=7))
    assert setup.fingerprint().differences(before) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_been(name: str) -> None:
    a, b = Setup(name), Setup(name)
    torch.manual_seed(5)
    a.step()
    a.step()
    torch.manual_seed(5)
    b.step()
    with put_back(b.model, b.average, *b.others):
        b.step(layers.conv_input(seed=3))
        b.step()
    b.step()
    for one, other in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert a.scheduler.get_last_lr() == b.scheduler.get_last_lr()


ACTIONS: dict[str, Callable[[Setup], object]] = {
    "step": lambda s: s.step(),
    "drop gradients": lambda s: s.optimizer.zero_grad(set_to_none=True),
    "zero gradients": lambda s: s.optimizer.zero_grad(set_to_none=False),
    "freeze parameters": lambda s: s.model[0].requires_grad_(False),
    "hold": lambda s: sn.freeze(s.model, "1"),
    "eval": lambda s: s.model.eval(),
    "momentum": lambda s: setattr(s.model[1], "momentum", None),
    "register a hook": lambda s: s.model[0].register_forward_hook(lambda *_: None),
    "register a hook on a tensor": lambda s: s.model[0].weight.register_hook(lambda g: 2 * g),
    "write through data": lambda s: s.model[0].weight.data.zero_(),
    "replace data": lambda s: setattr(s.model[0].weight, "data", torch.zeros(4, 3, 3, 3)),
    "cast": lambda s: s.model.double(),
    "replace a parameter": lambda s: setattr(
        s.model[0], "weight", nn.Parameter(torch.zeros(4, 3, 3, 3))
    ),
    "replace a buffer": lambda s: setattr(s.model[1], "running_mean", torch.zeros(4)),
    "replace a layer": lambda s: s.model.__setitem__(1, nn.Identity()),
    "draw a buffer into a graph": lambda s: s.model[1].running_mean.mul_(s.model[1].weight),
    "add a group": lambda s: s.optimizer.add_param_group(
        {"params": [nn.Parameter(torch.zeros(1))]}
    ),
    "remove a group": lambda s: s.optimizer.param_groups.pop(),
    "new lr": lambda s: s.optimizer.param_groups[0].update(lr=3.0),
    "clear the state": lambda s: s.optimizer.state.clear(),
    "load the state": lambda s: s.optimizer.load_state_dict(s.optimizer.state_dict()),
    "write the state": lambda s: [
        t.fill_(3) for state in s.optimizer.state.values() for t in state.values()
    ],
    "draw": lambda s: (torch.rand(1), random.random(), np.random.rand()),
    "attribute": lambda s: setattr(s.model, "seen", [1]),
    "no grad": lambda s: torch.set_grad_enabled(False),
}


@given(
    warm=st.integers(0, 2),
    actions=st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=6),
    ending=st.sampled_from(ENDINGS),
)
def test_any_sequence_leaves_no_trace(
    warm: int, actions: list[str], ending: type[BaseException] | None
) -> None:
    setup = Setup()
    for _ in range(warm):
        setup.step()
    before, python, numpy = setup.fingerprint(), random.getstate(), np.random.get_state()[1].copy()
    with (
        contextlib.suppress(Exception, KeyboardInterrupt),  # after some actions others raise
        put_back(setup.model, setup.average, *setup.others),
    ):
        for action in actions:
            ACTIONS[action](setup)
        if ending is not None:
            raise ending
    assert setup.fingerprint().differences(before) == []
    assert random.getstate() == python
    assert (np.random.get_state()[1] == numpy).all()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("action", sorted(set(ACTIONS) - {"draw", "no grad"}))
def test_every_action_leaves_a_trace_without_it(action: str) -> None:
    """What the property test does would be seen if nothing put it back."""
    setup = Setup()
    setup.step()
    before = setup.fingerprint()
    ACTIONS[action](setup)
    assert setup.fingerprint().differences(before)


@pytest.mark.parametrize("ending", ENDINGS)
def test_an_outstanding_graph_runs_backward_after(ending: type[BaseException] | None) -> None:
    setup, again = Setup(), Setup()
    x = layers.conv_input(seed=4)
    loss, wanted = (s.model(x).square().mean() for s in (setup, again))
    wanted.backward()
    with contextlib.suppress(Stop, KeyboardInterrupt), put_back(setup.model, *setup.others):
        setup.step()
        if ending is not None:
            raise ending
    loss.backward()
    for one, other in zip(setup.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_without_it_the_graph_would_not() -> None:
    setup = Setup()
    loss = setup.model(layers.conv_input()).square().mean()
    setup.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_kept_later_is_put_back_to_what_it_was_then() -> None:
    setup = Setup()
    with put_back(setup.model) as journal:
        setup.optimizer.param_groups[0]["lr"] = 0.5
        journal.keep(setup.optimizer)
        setup.step()
    assert setup.optimizer.param_groups[0]["lr"] == 0.5
    assert len(setup.optimizer.state) == 0


def test_the_journal_knows_what_was_before() -> None:
    net = layers.conv_net()
    weight = net[0].weight.detach().clone()
    other = torch.zeros(1)
    with put_back(net) as journal:
        assert not journal.has_changed(net[0].weight)
        net[0].weight.data.add_(1)
        assert torch.equal(journal.before(net[0].weight), weight)
        assert journal.has_changed(net[0].weight)
        assert journal.before(other) is None
        assert not journal.has_changed(other)
    assert torch.equal(net[0].weight, weight)


def test_sparse_gradients() -> None:
    net = nn.Sequential(nn.Embedding(8, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    optimizer = torch.optim.SparseAdam(net[0].parameters())
    x = torch.tensor([[1, 2], [3, 1]])

    def step() -> None:
        net(x).sum().backward()
        optimizer.step()

    step()
    values = net[0].weight.detach().clone(), net[0].weight.grad.to_dense().clone()
    grad, moments = net[0].weight.grad, optimizer.state[net[0].weight]["exp_avg"].clone()
    with put_back(net, optimizer):
        step()
        optimizer.zero_grad(set_to_none=False)
    assert net[0].weight.grad is grad
    assert torch.equal(net[0].weight, values[0])
    assert torch.equal(grad.to_dense(), values[1])
    assert torch.equal(optimizer.state[net[0].weight]["exp_avg"], moments)
    assert optimizer.state[net[0].weight]["step"] == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_two_optimizers(reentrant: bool) -> None:
    torch.manual_seed(0)
    parts = nn.ModuleList([layers.conv_net(), nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4))])
    optimizers = [torch.optim.Adam(part.parameters()) for part in parts]
    with unchanged(parts, *optimizers), put_back(parts, optimizers):
        x = layers.conv_input().requires_grad_()
        for optimizer in optimizers:
            optimizer.zero_grad()
            y = checkpoint(parts[0], x, use_reentrant=reentrant)
            parts[1](y).square().mean().backward()
            optimizer.step()


def test_tied_parameters_and_views() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    flat = torch.zeros(6)
    net.register_buffer("flat", flat)
    net.register_buffer("part", flat[:3])
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    with unchanged(net, optimizer), put_back(net, optimizer):
        net(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        net.part.add_(1)


def test_lazy_layers_are_lazy_again() -> None:
    net = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d())
    with unchanged(net), put_back(net):
        net(torch.randn(4, 2)).sum().backward()


def test_a_scripted_layer() -> None:
    net = nn.Sequential(torch.jit.script(layers.conv_net()), nn.ReLU())
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with put_back(net):
        net(layers.conv_input()).sum().backward()
        net.eval()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net[0].training
    assert all(p.grad is None for p in net.parameters())


def test_modes_through_a_train_of_its_own() -> None:
    net = nn.Sequential(layers.make("own sticky train()"), nn.Linear(4, 4)).train()
    with unchanged(net), put_back(net):
        net.eval()


@dataclass
class Counts:
    steps: int = 0


class Noting(nn.Module):
    """A model with containers, a data class and a generator among its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.counts = Counts()
        self.bank = collections.OrderedDict(a=[torch.zeros(2)], c=1)
        self.names = {"a"}
        self.generator = torch.Generator().manual_seed(3)
        self.itself = [self]  # a cycle
        self.elsewhere = object()

    def forward(self) -> Tensor:
        self.counts.steps += 1
        self.bank["a"].append(torch.rand(2, generator=self.generator))
        self.bank["a"][0].add_(1)
        self.bank.move_to_end("a")
        self.names.add("b")
        return self.weight.sum()


def test_attributes_of_the_models_own() -> None:
    net = Noting()
    drawn = net.generator.get_state()
    with unchanged(net), put_back(net):
        net().backward()
    assert net.counts.steps == 0
    assert list(net.bank) == ["a", "c"]
    assert len(net.bank["a"]) == 1
    assert torch.equal(net.generator.get_state(), drawn)


def test_what_only_tells_its_state() -> None:
    thing = Slotted()
    with put_back([thing]):
        thing.count = 9
    assert thing.count == 3


def test_a_compiled_model() -> None:
    net = layers.conv_net()
    compiled = torch.compile(net, backend="eager")
    optimizer = torch.optim.Adam(net.parameters())
    with unchanged(net, optimizer), put_back(compiled, optimizer):
        compiled(layers.conv_input()).sum().backward()
        optimizer.step()
        compiled.eval()
    assert type(net) is nn.Sequential


def test_quantized_tensors() -> None:
    net = nn.Module()
    net.register_buffer("codes", torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8))
    with put_back(net):
        net.codes.copy_(torch.zeros(4))
    assert net.codes.int_repr().tolist() == [10] * 4


def test_strides() -> None:
    net = nn.Conv2d(3, 4, 3)
    with unchanged(net), put_back(net):
        net.to(memory_format=torch.channels_last)
    square = nn.Linear(3, 3)
    with unchanged(square), put_back(square):
        square.weight.data = square.weight.data.t()  # the same memory


def test_the_rest_goes_back_when_one_thing_cannot() -> None:
    class Stubborn(Slotted):
        __slots__ = ()

        def load_state_dict(self, state: dict[str, int]) -> None:
            raise ValueError("no")

    net, thing = layers.conv_net(), Stubborn()
    with unchanged(net), pytest.raises(ValueError, match="no"), put_back(net, thing):
        net.eval()[0].weight.data.zero_()


def test_inference_tensors() -> None:
    net = nn.BatchNorm1d(2)
    with torch.inference_mode():
        net.running_mean = torch.zeros(2)
    with put_back(net), torch.inference_mode():
        net.running_mean.add_(1)
    assert net.running_mean.tolist() == [0, 0]
    assert net.running_mean.is_inference()


def test_a_surrounding_autocast_keeps_no_cast_of_other_weights() -> None:
    net = nn.Linear(2, 1, bias=False)
    x = torch.ones(1, 2)
    with torch.autocast("cpu", torch.bfloat16):
        before = net(x)
        with put_back(net):
            net.weight.data.add_(5)
            torch.clear_autocast_cache()
            net(x)
        assert torch.equal(net(x), before)


def test_no_object_is_kept_alive() -> None:
    import gc
    import weakref

    net = layers.conv_net()
    gone = weakref.ref(net)
    with put_back(net):
        net(layers.conv_input()).sum().backward()
    del net
    gc.collect()
    assert gone() is None
