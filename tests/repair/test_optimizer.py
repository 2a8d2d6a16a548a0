"""Orphans leave the optimizer, everything else in it stays the same object; stale gradients go."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import stillnorm as sn
from stillnorm.errors import SelectorError, StateError
from stillnorm.repair import optimizer as room
from stillnorm.repair.optimizer import drop_stale_gradients, repair_optimizer
from support import layers
from support.fingerprint import Fingerprint, bits
from support.zoo import torchvision

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, 1e-2, weight_decay=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=0.1),
    "SGD fused": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, foreach=True),
    "Adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=0.1),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.5),
    "AdamW fused": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.5, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 1e-2, foreach=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "Adadelta": lambda p: torch.optim.Adadelta(p, 1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, 1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, 1e-2),
}


def grouped(net: nn.Module, names: bool = False) -> list[dict[str, Any]]:
    """Three groups: convolutions, the norm that will be replaced, the other norms."""
    named = list(net.named_parameters())
    convs = [item for item in named if item[1].dim() > 1]
    norm = [item for item in named if item[0].startswith("1.")]
    rest = [item for item in named if item[1].dim() == 1 and not item[0].startswith("1.")]
    return [
        {"params": [(n, p) if names else p for n, p in items], "lr": lr}
        for items, lr in ((convs, 1e-2), (norm, 1e-3), (rest, 1e-4))
    ]


def step(net: nn.Module, optimizer: Optimizer, seed: int) -> None:
    optimizer.zero_grad()
    net.train()(layers.conv_input(seed=seed)).square().mean().backward()
    optimizer.step()


def warm(net: nn.Module, make: Callable[[Any], Optimizer], names: bool = False) -> Optimizer:
    optimizer = make(grouped(net, names))
    for seed in range(3):
        step(net, optimizer, seed)
    return optimizer


def replace_norms(net: nn.Module) -> None:
    """Other norms at 1, and at 3.1."""
    net[1] = nn.GroupNorm(1, net[1].num_features)
    net[3][1] = nn.BatchNorm2d(net[3][1].num_features)


def content(optimizer: Optimizer) -> list[Any]:
    """Everything in an optimizer, objects by identity and tensors by bits too, in order."""
    seen: list[Any] = [id(optimizer.state), id(optimizer.param_groups)]
    for group in optimizer.param_groups:
        seen += [id(group), id(group["params"]), [id(p) for p in group["params"]]]
        seen += [(key, repr(value)) for key, value in group.items() if key != "params"]
    for parameter, state in optimizer.state.items():
        seen += [id(parameter), id(state)]
        for key, value in state.items():
            seen += [key, id(value), bits(value) if isinstance(value, torch.Tensor) else value]
    return seen


# ------------------------------------------------------------------ what goes, what stays


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_orphans_go_and_everything_else_is_the_same_object(name: str) -> None:
    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS[name])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    gone = [*net[1].parameters(), *net[3][1].parameters()]
    before = {id(p): state for p, state in optimizer.state.items()}
    lists = [group["params"] for group in optimizer.param_groups]
    options = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    replace_norms(net)
    report = repair_optimizer(net, optimizer)
    assert report.removed == len(gone) == 4
    assert [(group.removed, group.kept) for group in report.groups] == [
        (0, len(lists[0])),
        (2, 0),
        (2, len(lists[2])),
    ]
    assert report.missing == ("1.weight", "1.bias", "3.1.weight", "3.1.bias")
    ids = {id(p) for p in gone}
    assert all(g["params"] is one for g, one in zip(optimizer.param_groups, lists, strict=True))
    assert not ids & {id(p) for one in lists for p in one}
    assert options == [
        {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
    ]
    left = {id(p): state for p, state in optimizer.state.items()}
    assert left.keys() == before.keys() - ids
    assert all(left[key] is before[key] for key in left)
    old = [bits(p) for p in gone]
    for seed in range(2):
        step(net, optimizer, seed)
        scheduler.step()
    assert [bits(p) for p in gone] == old
    assert len(optimizer.param_groups) == len(scheduler.get_last_lr()) == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_stays_trains_as_if_the_orphans_had_been_left(name: str) -> None:
    """Orphans have no gradients, so that the steps of the others are the same without them."""
    twins = [layers.conv_net(), layers.conv_net()]
    optimizers = [warm(net, OPTIMIZERS[name]) for net in twins]
    for net in twins:
        net[1] = nn.Identity()
    repair_optimizer(twins[1], optimizers[1])
    for seed in range(3):
        for net, optimizer in zip(twins, optimizers, strict=True):
            step(net, optimizer, seed)
    a, b = (net.state_dict() for net in twins)
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("names", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_undo_is_exact(name: str, names: bool) -> None:
    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS[name], names)
    replace_norms(net)
    before = content(optimizer)
    report = repair_optimizer(net, optimizer)
    assert content(optimizer) != before
    report.undo()
    assert content(optimizer) == before
    report.undo()
    assert content(optimizer) == before


def test_names_are_cut_with_their_parameters() -> None:
    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS["AdamW"], names=True)
    replace_norms(net)
    repair_optimizer(net, optimizer)
    own = dict(net.named_parameters())
    for group in optimizer.param_groups:
        assert len(group["params"]) == len(group["param_names"])
        for key, parameter in zip(group["param_names"], group["params"], strict=True):
            assert own[key] is parameter


def test_the_state_dict_fits_an_optimizer_made_anew() -> None:
    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS["AdamW"])
    net[1] = nn.Identity()
    fresh = OPTIMIZERS["AdamW"](grouped(net))
    with pytest.raises(ValueError, match="doesn't match the size"):
        fresh.load_state_dict(optimizer.state_dict())
    repair_optimizer(net, optimizer)
    fresh.load_state_dict(optimizer.state_dict())
    assert len(fresh.state) == len(list(net.parameters()))


def test_undo_after_training_on_keeps_what_the_others_learned() -> None:
    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS["Adam"], names=True)
    order = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    names = [list(group["param_names"]) for group in optimizer.param_groups]
    states = [id(p) for p in optimizer.state]
    old = net[1].weight
    moments = optimizer.state[old]
    net[1] = nn.Identity()
    report = repair_optimizer(net, optimizer)
    step(net, optimizer, 7)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps = optimizer.state[net[0].weight]["step"].clone()
    report.undo()
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == order
    assert [group["param_names"] for group in optimizer.param_groups] == names
    assert [id(p) for p in optimizer.state] == states
    assert optimizer.state[old] is moments
    assert torch.equal(optimizer.state[net[0].weight]["step"], steps)
    assert int(steps) == 4


def test_a_healthy_optimizer_is_left_alone() -> None:
    net = layers.conv_net()
    for make in (*OPTIMIZERS.values(), lambda p: torch.optim.LBFGS(net.parameters())):
        optimizer = make(net.parameters())
        before = content(optimizer)
        report = repair_optimizer(net, optimizer)
        assert (report.removed, report.missing) == (0, ())
        assert content(optimizer) == before
        report.undo()
        assert content(optimizer) == before


def test_the_same_model_in_a_wrapper_or_held_or_cast() -> None:
    """Parameters keep their identity there: there is nothing to repair."""
    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS["AdamW"])
    sn.freeze(net)
    for model in (nn.DataParallel(net), torch.compile(net), net.double()):
        assert repair_optimizer(model, optimizer).removed == 0


def test_of_a_loss_with_parameters_the_list_of_both_tells() -> None:
    net, loss = layers.conv_net(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*net.parameters(), *loss.parameters()], 0.1)
    assert repair_optimizer(nn.ModuleList([net, loss]), optimizer).removed == 0
    assert repair_optimizer(net, optimizer).removed == 2


def test_frozen_parameters_are_not_missing() -> None:
    net = layers.conv_net()
    optimizer = torch.optim.SGD(net[0].parameters(), 0.1)
    net.requires_grad_(False)
    assert repair_optimizer(net, optimizer).missing == ()


def test_after_splitting_the_new_parameters_are_named() -> None:
    norm = nn.BatchNorm2d(3)
    net = nn.Sequential(norm, nn.Conv2d(3, 3, 1), norm)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    sn.split_shared(net, [torch.randn(4, 3, 6, 6)], affine="private")
    report = repair_optimizer(net, optimizer)
    assert report.removed == 0
    assert report.missing == ("2.weight", "2.bias")


def test_the_report_can_be_read() -> None:
    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS["AdamW"])
    replace_norms(net)
    report = repair_optimizer(net, optimizer)
    assert str(report).startswith("4 parameters removed from the optimizer")
    assert "in no group, not trained: 1.weight" in str(report)
    assert '"removed": 2' in report.to_json()


# ------------------------------------------------------------------ what is refused


def test_a_copy_has_other_parameters() -> None:
    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS["AdamW"])
    before = content(optimizer)
    with pytest.raises(StateError, match="none of the 11 parameters in the AdamW is the model's"):
        repair_optimizer(copy.deepcopy(net), optimizer)
    assert content(optimizer) == before


def test_lbfgs_is_cut_before_it_has_a_history_only() -> None:
    net = layers.conv_net()

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = net.train()(layers.conv_input()).square().mean()
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS(net.parameters(), 1e-3, max_iter=2)
    net[1] = nn.Identity()
    assert repair_optimizer(net, optimizer).removed == 2
    optimizer.step(closure)
    net[3][1] = nn.Identity()
    before = content(optimizer)
    with pytest.raises(StateError, match="LBFGS keeps one history of all parameters"):
        repair_optimizer(net, optimizer)
    assert content(optimizer) == before


def test_an_optimizer_with_another_inside() -> None:
    class Sharing(torch.optim.SGD):
        """As Lookahead does: the lists are the inner one's."""

        def __init__(self, inner: Optimizer) -> None:
            super().__init__(inner.param_groups, 0.1)
            self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state

    class Copying(Sharing):
        """As ZeroRedundancyOptimizer does."""

        def __init__(self, inner: Optimizer) -> None:
            super().__init__(inner)
            self.param_groups = [{**g, "params": list(g["params"])} for g in inner.param_groups]

    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS["AdamW"])
    net[1] = nn.Identity()
    outer = Copying(optimizer)
    before = content(outer), content(optimizer)
    with pytest.raises(StateError, match="Copying holds another optimizer, AdamW, with"):
        repair_optimizer(net, outer)
    assert (content(outer), content(optimizer)) == before
    assert repair_optimizer(net, Sharing(optimizer)).removed == 2
    assert repair_optimizer(net, optimizer).removed == 0


def test_no_optimizer() -> None:
    net = layers.conv_net()
    with pytest.raises(StateError, match=r"a Sequential is not a torch\.optim\.Optimizer"):
        repair_optimizer(net, net)


# ------------------------------------------------------------------ gradients


GRADIENT_MOVED = ("SGD", "SGD momentum", "AdamW", "AdamW fused")


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", GRADIENT_MOVED)
def test_frozen_parameters_stand_still_without_their_gradient(name: str, set_to_none: bool) -> None:
    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS[name])
    norms = {
        f"{path}.{name}": parameter
        for path, module in net.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, parameter in module.named_parameters()
    }
    for parameter in norms.values():
        parameter.requires_grad_(False)

    def moved(steps: int) -> bool:
        before = [bits(p) for p in norms.values()]
        for seed in range(steps):
            net.train()(layers.conv_input(seed=seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        return [bits(p) for p in norms.values()] != before

    before = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    gradients = {n: p.grad for n, p in norms.items()}
    assert moved(2), "the near miss: frozen, and moved"
    net.load_state_dict(before[0])
    optimizer.load_state_dict(before[1])
    for key, parameter in norms.items():
        parameter.grad = gradients[key]
    report = drop_stale_gradients(net)
    assert report.dropped == tuple(norms)
    assert not moved(2)
    report.undo()
    assert all(p.grad is gradients[n] for n, p in norms.items())
    assert all(p.grad is not None for p in norms.values())


def gradients(net: nn.Module) -> dict[str, int | None]:
    return {n: None if p.grad is None else id(p.grad) for n, p in net.named_parameters()}


def test_only_norms_that_do_not_require_gradients() -> None:
    net = layers.conv_net()
    net.train()(layers.conv_input()).sum().backward()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    net[3][1].weight.requires_grad_(False)
    before, kept = gradients(net), [p.grad for p in net.parameters()]
    report = drop_stale_gradients(net)
    assert report.dropped == ("1.weight", "1.bias", "3.1.weight")
    for key, gradient in gradients(net).items():
        assert gradient == (None if key in report.dropped else before[key])
    assert str(report).startswith("3 stale gradients dropped")
    assert '"dropped"' in report.to_json()
    report.undo()
    assert gradients(net) == before
    report.undo()
    assert gradients(net) == before
    assert len(kept) == len(before)


def test_selected_layers_and_shared_parameters() -> None:
    net = layers.conv_net()
    net.train()(layers.conv_input()).sum().backward()
    net.requires_grad_(False)
    assert drop_stale_gradients(net, "3").dropped == ("3.1.weight", "3.1.bias")
    assert net[1].weight.grad is not None
    with pytest.raises(SelectorError):
        drop_stale_gradients(net, "nowhere")
    shared = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    shared[1].weight = shared[0].weight
    shared(torch.randn(4, 3)).sum().backward()
    shared.requires_grad_(False)
    assert drop_stale_gradients(shared).dropped == ("0.weight", "0.bias", "1.bias")
    assert drop_stale_gradients(shared).dropped == ()


def test_norms_without_affine_and_foreign_frozen_ones() -> None:
    net = nn.Sequential(
        nn.BatchNorm2d(3, affine=False), torchvision.ops.FrozenBatchNorm2d(3), nn.LazyBatchNorm1d()
    )
    assert drop_stale_gradients(net).dropped == ()


# ------------------------------------------------------------------ all or nothing


class Interrupted(BaseException):
    """A Ctrl-C, as far as any code can tell."""


def interrupted_at(n: int, call: Callable[[], object]) -> bool:
    """Raise at the n-th line that `call` executes in the room; tell whether it got there."""
    count = 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal count
        if "stillnorm/repair/" not in frame.f_code.co_filename:
            return None
        if event == "line":
            count += 1
            if count == n:
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except Interrupted:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_line_of_the_repair() -> None:
    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS["AdamW"], names=True)
    replace_norms(net)
    before, n = content(optimizer), 1
    report = repair_optimizer(net, optimizer)
    done = content(optimizer)
    report.undo()
    seen = []
    while interrupted_at(n, lambda: repair_optimizer(net, optimizer)) and done not in seen:
        seen.append(content(optimizer))
        assert seen[-1] in (before, done), n
        n += 1
    assert seen.count(before) > 100
    assert content(optimizer) == done


def test_an_interrupt_at_any_line_of_undo_can_be_repeated() -> None:
    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS["AdamW"], names=True)
    replace_norms(net)
    before, n = content(optimizer), 1
    report = repair_optimizer(net, optimizer)
    while interrupted_at(n, report.undo):
        report.undo()
        assert content(optimizer) == before, n
        report = repair_optimizer(net, optimizer)
        n += 1
    assert n > 10
    assert content(optimizer) == before


def test_an_interrupt_at_any_line_of_dropping() -> None:
    net = layers.conv_net()
    net.train()(layers.conv_input()).sum().backward()
    net.requires_grad_(False)
    before, n = Fingerprint(net), 1
    report = drop_stale_gradients(net)
    done = Fingerprint(net)
    report.undo()
    seen = []
    while interrupted_at(n, lambda: drop_stale_gradients(net)) and done not in seen:
        seen.append(Fingerprint(net))
        assert seen[-1] in (before, done), n
        n += 1
    assert seen.count(before) > 20
    assert Fingerprint(net) == done


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["_cut", "_forget", "_refuse", "RepairedGroup", "OptimizerReport"])
def test_an_error_at_any_step_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    net = layers.conv_net()
    optimizer = warm(net, OPTIMIZERS["Adam"])
    replace_norms(net)
    before, real = content(optimizer), getattr(room, name)

    def explode(*args: Any, **kwargs: Any) -> Any:
        if when == "after":
            real(*args, **kwargs)
        raise ValueError("step")

    monkeypatch.setattr(room, name, explode)
    with pytest.raises(ValueError, match="step"):
        repair_optimizer(net, optimizer)
    assert content(optimizer) == before
