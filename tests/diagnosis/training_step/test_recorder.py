"""What is seen of a training step: calls, gradients, optimizers."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import stillnorm as sn
from diagnosis import steps
from diagnosis.nets import data
from diagnosis.steps import net_, seen
from stillnorm.diagnosis.training_step.step import Step
from support.fingerprint import Fingerprint
from support.zoo import torchvision


def test_a_plain_step() -> None:
    net = net_()
    step = seen(net, steps.plain(steps.sgd(net)))
    assert [call.layer.path for call in step.calls] == ["1", "4"]
    assert (step.steps, step.backwards, step.updates) == (1, 1, None)
    for call in step.calls:
        assert call.moved
        assert call.grad
        assert call.training
        assert not call.in_backward
        assert not call.displaced
        assert (call.used, call.gradient, call.shape) == ("batch", "used", (16, 8, 8, 8))
        assert str(call.site).startswith("steps.py:")
        assert call.node is None
    assert set(step.trained) == set(net.parameters())


def test_moments_are_those_of_the_input() -> None:
    net = net_()
    step = seen(net, steps.plain(steps.sgd(net)))
    x = net[0](data(16)).double()
    torch.testing.assert_close(step.calls[0].moments[0], x.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert 0 < step.shift(step.calls[0].layer) < 0.2


@pytest.mark.parametrize("make", [steps.checkpointed, steps.checkpointed_in_parts])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputation_is_told_from_the_forward(make: Any, reentrant: bool) -> None:
    net = net_()
    step = seen(net, make(steps.sgd(net), reentrant))
    first, again = (
        [c for c in step.calls if not c.in_backward],
        [c for c in step.calls if c.in_backward],
    )
    assert len(first) == len(again) == 2
    assert all(call.is_recomputed and call.gradient == "used" for call in first)
    assert all(call.moved for call in step.calls)
    assert {call.grad for call in first} == {not reentrant}


@pytest.mark.parametrize("early", [False, True])
def test_a_recomputation_that_stops_in_the_norm_itself(early: bool) -> None:
    """Its output is not needed again, and torch stops the recomputation before there is one."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=False, early_stop=early)

    step = seen(net, steps.plain(steps.sgd(net), forward))
    assert [(call.in_backward, call.moved) for call in step.calls] == [(False, True), (True, True)]


def test_the_second_forward_of_sam() -> None:
    net = net_()
    step = seen(net, steps.sam(steps.sgd(net)))
    assert [call.displaced for call in step.calls] == [False, False, True, True]
    assert [call.gradient for call in step.calls] == ["dropped"] * 2 + ["used"] * 2


def test_weights_that_are_clipped_are_not_taken_back() -> None:
    net = net_()
    optimizer = steps.sgd(net)
    step = steps.accumulating(optimizer)

    def train_step(model: nn.Module, x: Tensor) -> None:
        with torch.no_grad():
            model[0].weight.clamp_(-0.01, 0.01)
        step(model, x)

    assert not any(call.displaced for call in seen(net, train_step).calls)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_accumulate_are_used(set_to_none: bool) -> None:
    net = net_()
    nn.init.zeros_(net[4].weight)  # below it every gradient is zero, and yet it was not dropped
    step = seen(net, steps.accumulating(steps.sgd(net), 4, set_to_none))
    assert [call.gradient for call in step.calls] == ["used"] * 8
    assert step.backwards == 4


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_zeroed_are_dropped(set_to_none: bool) -> None:
    net = net_()
    optimizer = steps.sgd(net)

    def train_step(model: nn.Module, x: Tensor) -> None:
        for _ in range(2):
            optimizer.zero_grad(set_to_none)
            steps.loss_of(model(x)).backward()
        optimizer.step()

    assert [c.gradient for c in seen(net, train_step).calls] == ["dropped"] * 2 + ["used"] * 2


def test_a_step_for_each_backward_uses_all() -> None:
    net = net_()
    optimizer = steps.sgd(net)
    once = steps.plain(optimizer)

    def train_step(model: nn.Module, x: Tensor) -> None:
        once(model, x)
        once(model, x)

    step = seen(net, train_step)
    assert step.steps == 2
    assert [call.gradient for call in step.calls] == ["used"] * 4
    assert [call.steps for call in step.calls] == [0, 0, 1, 1]


def test_a_backward_called_by_its_function() -> None:
    net = net_()
    optimizer = steps.sgd(net)

    def train_step(model: nn.Module, x: Tensor) -> None:
        optimizer.zero_grad()
        for part in x.chunk(2):
            torch.autograd.backward(steps.loss_of(model(part)))
        optimizer.step()

    step = seen(net, train_step)
    assert step.backwards == 2
    assert [call.gradient for call in step.calls] == ["used"] * 4


def test_gradients_of_parameters_by_grad_and_an_update_by_hand() -> None:
    net = net_()

    def train_step(model: nn.Module, x: Tensor) -> None:
        weights = list(model.parameters())
        grads = torch.autograd.grad(steps.loss_of(model(x)), weights)
        with torch.no_grad():
            for weight, grad in zip(weights, grads, strict=True):
                weight -= 0.1 * grad

    step = seen(net, train_step)
    assert step.steps == 0
    assert step.trained >= {net[0].weight, *net[1].parameters(), *net[8].parameters()}
    assert [call.gradient for call in step.calls] == ["used"] * 2


def test_lbfgs_evaluates_its_closure_within_one_step() -> None:
    net = net_()
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)

    def train_step(model: nn.Module, x: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = steps.loss_of(model(x))
            loss.backward()
            return loss

        optimizer.step(closure)

    step = seen(net, train_step)
    assert step.steps == 1
    assert len(step.calls) == 2 * 3
    assert len(step.trained) == 10
    assert len(optimizer.state) == 0


def test_an_optimizer_inside_another_counts_once() -> None:
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self) -> None:
            self.inner.step()

    net = net_()
    inner = torch.optim.Adam(net.parameters())
    step = seen(net, steps.plain(Lookahead(inner)))
    assert step.steps == 1
    assert len(inner.state) == 0


def test_a_gan_step_uses_all_that_it_computes() -> None:
    model = steps.Both()
    train_step, optimizers = steps.gan_step(model)
    before = Fingerprint(model)
    step = seen(model, train_step)
    assert step.steps == 2
    assert {call.gradient for call in step.calls} == {"used"}
    assert Fingerprint(model).differences(before) == []
    assert not any(optimizer.state for optimizer in optimizers)


def test_mixed_precision_with_a_scaler_and_a_schedule() -> None:
    net = net_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    scaler = torch.amp.GradScaler("cpu")

    def train_step(model: nn.Module, x: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = steps.loss_of(model(x).float())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()

    before, states = Fingerprint(net), (scaler.state_dict(), scheduler.state_dict())
    step = seen(net, train_step, optimizer=optimizer, restore=(scaler, scheduler))
    assert step.steps == 1
    assert Fingerprint(net).differences(before) == []
    assert (scaler.state_dict(), scheduler.state_dict()) == states
    assert scaler._scale is None
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_a_scaler_that_skips_the_step() -> None:
    net = net_()
    optimizer = steps.sgd(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    def train_step(model: nn.Module, x: Tensor) -> None:
        optimizer.zero_grad()
        scaler.scale(1e9 * steps.loss_of(model(x))).backward()
        scaler.step(optimizer)

    step = seen(net, train_step)
    assert step.steps == 0
    assert not step.trained


def test_what_a_lr_of_zero_and_no_gradient_do_not_train() -> None:
    net = net_()
    idle = torch.optim.SGD(net[0].parameters(), lr=0.1)
    optimizer = torch.optim.SGD(
        [
            {"params": net[1].parameters(), "lr": 0.0},
            {"params": net[3].parameters()},
            {"params": net[4].parameters()},
        ],
        lr=0.1,
    )

    def train_step(model: nn.Module, x: Tensor) -> None:
        optimizer.zero_grad()
        with torch.no_grad():
            x = model[:4](x)
        steps.loss_of(model[4:](x)).backward()
        optimizer.step()

    step = seen(net, train_step, optimizer=optimizer)
    assert step.trained == frozenset(net[4].parameters())
    assert step.unheld == frozenset([*net[0].parameters(), *net[8].parameters()])
    step = seen(net, train_step, optimizer=optimizer, restore=(idle,))
    assert step.trained == frozenset([*net[0].parameters(), *net[4].parameters()])


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0)])
def test_a_learning_rate_of_zero_trains_nothing(zero: Any) -> None:
    net = net_()
    groups = [{"params": net[:3].parameters(), "lr": zero}, {"params": net[3:].parameters()}]
    step = seen(net, steps.plain(torch.optim.AdamW(groups, lr=0.1)))
    assert step.trained == frozenset(net[3:].parameters())


@pytest.mark.parametrize("quietly", [sn.no_updates, sn.eval_mode])
def test_what_is_taken_back_has_not_moved(quietly: Any) -> None:
    net = net_()
    net[4] = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)  # its values are kept
    step = seen(net, steps.validating(steps.sgd(net), quietly))
    assert [call.moved for call in step.calls] == [True, True, False, False]


@pytest.mark.parametrize(
    ("already", "told"), [(True, True), (False, True), (True, False), (False, False)]
)
def test_whether_the_step_asks_for_eval_itself(already: bool, told: bool) -> None:
    net = net_().train(not already)
    once = steps.plain(steps.sgd(net))

    def train_step(model: nn.Module, x: Tensor) -> None:
        if told:
            model.eval()
        once(model, x)

    step = seen(net, train_step)
    assert step.told_eval is told
    assert net.training is not already
    assert "train" not in net.__dict__
    assert all(call.training == (not already and not told) for call in step.calls)


def coupled(step: Step) -> list[str]:
    return [layer.path for layer in step.coupled]


def test_a_penalty_on_input_gradients_is_seen() -> None:
    net = net_()
    assert coupled(seen(net, steps.penalised(steps.sgd(net)))) == ["1", "4"]


def test_a_penalty_behind_the_first_norm() -> None:
    net = net_()

    def train_step(model: nn.Module, x: Tensor) -> None:
        hidden = model[:3](x).detach().requires_grad_()
        (grad,) = torch.autograd.grad(model[3:](hidden).sum(), hidden, create_graph=True)
        grad.square().sum().backward()

    assert coupled(seen(net, train_step)) == ["4"]


@pytest.mark.parametrize("train_step", steps.uncoupled(), ids=lambda step: step.__name__)
def test_what_is_no_penalty(train_step: Any) -> None:
    assert coupled(seen(net_(), train_step)) == []


def test_a_frozen_parameter_that_the_optimizer_moves() -> None:
    net = net_()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    optimizer.zero_grad()
    steps.loss_of(net(data(16))).backward()
    net[1].requires_grad_(False)
    net[4].weight.requires_grad_(False).grad = None

    def train_step(model: nn.Module, x: Tensor) -> None:
        optimizer.zero_grad(set_to_none=False)
        steps.loss_of(model(x)).backward()
        optimizer.step()

    moves = seen(net, train_step).frozen_moves
    assert {(move.layer.path, move.name) for move in moves} == {("1", "weight"), ("1", "bias")}
    assert all(move.had_gradient and move.by > 0 for move in moves)


def test_functorch_inside_a_step() -> None:
    net = net_()

    def train_step(model: nn.Module, x: Tensor) -> None:
        weights = {k: v.detach() for k, v in model.named_parameters()}

        def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return steps.loss_of(torch.func.functional_call(model.eval(), weights, (x[None],)))

        torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x)

    step = seen(net, train_step)
    assert [call.used for call in step.calls] == ["running"] * 2
    assert not any(call.moved for call in step.calls)


def test_a_copy_of_the_model_made_inside_the_step() -> None:
    net = net_()
    before = Fingerprint(net)

    def train_step(model: nn.Module, x: Tensor) -> None:
        twin = copy.deepcopy(model)
        twin.eval()
        assert model.training
        assert not twin.training
        twin(x)

    step = seen(net, train_step)
    assert step.calls == ()
    assert not step.told_eval
    assert Fingerprint(net).differences(before) == []


def test_a_compiled_model_runs_as_written() -> None:
    net = net_()
    compiled = torch.compile(net, backend="eager")
    compiled(data(16))
    assert len(seen(compiled, steps.plain(steps.sgd(net))).calls) == 2


def test_a_resnet_under_bfloat16() -> None:
    net = torchvision.models.resnet18(num_classes=4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

    def train_step(model: nn.Module, x: Tensor) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = steps.loss_of(model(x))
        loss.backward()
        optimizer.step()

    x = torch.randn(2, 3, 32, 32)
    before = Fingerprint(net)
    step = seen(net, train_step, x)
    assert len(step.calls) == 20
    assert all(call.moved and call.gradient == "used" for call in step.calls)
    assert set(step.trained) == set(net.parameters())
    assert Fingerprint(net).differences(before) == []


def test_no_graph_outlives_the_step() -> None:
    class Hook:
        def __call__(self, grad: Tensor) -> None: ...

    net = net_()
    alive: list[weakref.ref[Hook]] = []

    def train_step(model: nn.Module, x: Tensor) -> None:
        hidden, hook = model[:2](x), Hook()
        alive.append(weakref.ref(hook))
        hidden.register_hook(hook)
        steps.loss_of(model[2:](hidden)).backward()

    seen(net, train_step)
    gc.collect()
    assert alive[0]() is None


def test_a_graph_that_is_kept_no_longer_tells() -> None:
    kept: list[Tensor] = []
    net = net_()
    step = seen(net, lambda model, x: kept.append(steps.loss_of(model(x))))
    kept[0].backward()
    assert [call.backwards for call in step.calls] == [[], []]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_backward_in_another_thread(reentrant: bool) -> None:
    """As autograd's own threads run it for other devices: no mode hears what happens there."""
    net = net_()
    optimizer = steps.sgd(net)

    def train_step(model: nn.Module, x: Tensor) -> None:
        optimizer.zero_grad()
        loss = steps.loss_of(checkpoint(model, x.requires_grad_(), use_reentrant=reentrant))
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
        optimizer.step()

    step = seen(net, train_step)
    assert [(call.in_backward, call.used, call.moved) for call in step.calls] == [
        (False, "batch", True),
        (False, "batch", True),
        (True, "batch", True),
        (True, "batch", True),
    ]
    assert [call.gradient for call in step.calls[:2]] == ["used"] * 2
    assert [call.is_recomputed for call in step.calls[:2]] == [True] * 2


def test_a_layer_is_believed_by_what_it_does_and_not_by_its_flag() -> None:
    class Always(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            statistics = self.running_mean, self.running_var
            return F.batch_norm(2 * x, *statistics, self.weight, self.bias, training=True)

    net = net_().eval()
    net[1] = Always(8).eval()
    step = seen(net, steps.plain(steps.sgd(net)))
    assert [(call.used, call.training) for call in step.calls] == [
        ("batch", False),
        ("running", False),
    ]
    seen_by_kernel = 2 * net[0](data(16)).double().mean((0, 2, 3))
    torch.testing.assert_close(step.calls[0].moments[0], seen_by_kernel, rtol=1e-5, atol=1e-5)
