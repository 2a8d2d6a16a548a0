"""assert_frozen_through: holds through real training, and names whatever thaws or moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from diagnosis.nets import conv_net, data, estimated
from stillnorm import freeze
from stillnorm.errors import SelectorError, VerifyError
from stillnorm.testing import assert_frozen_through
from support.zoo import images, make


def training(net: nn.Module, x: object = None, **how: float) -> Callable[[], float]:
    optimizer = torch.optim.SGD(net.parameters(), **{"lr": 0.01, "weight_decay": 0.1, **how})

    def step() -> float:
        net.train()
        loss = net(data(8) if x is None else x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def fails(net: nn.Module, step: Callable[[], object], message: str, layers: object = None) -> None:
    with pytest.raises(VerifyError, match=message) as raised:
        assert_frozen_through(net, step, layers)
    assert isinstance(raised.value, AssertionError)


def test_held_layers_pass_and_the_step_has_run() -> None:
    net = estimated(conv_net())
    freeze(net)
    before = net[0].weight.clone()
    assert assert_frozen_through(net, training(net)) > 0
    assert not torch.equal(net[0].weight, before)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "transformers/resnet"])
def test_real_models_pass(name: str) -> None:
    net = make(name)
    freeze(net)
    assert_frozen_through(net, training(net, images(2)))


def test_layers_that_may_learn_pass() -> None:
    net = estimated(conv_net())
    freeze(net, affine="trains")
    weight = net[1].weight.clone()
    assert_frozen_through(net, training(net))
    assert not torch.equal(net[1].weight, weight)


def test_only_the_layers_that_were_chosen_count() -> None:
    net = estimated(conv_net())
    freeze(net, "1")
    assert_frozen_through(net, training(net), "1")
    fails(net, training(net), "^4: would normalise by the batch", None)
    with pytest.raises(SelectorError):
        assert_frozen_through(net, training(net), "backbone")


class TestFails:
    def test_before_the_step_where_the_layer_is_not_frozen(self) -> None:
        net = estimated(conv_net()).eval()
        fails(net, pytest.fail, r"^1: would normalise by the batch in train\(\)")

    def test_where_momentum_and_gradients_are_off_and_nothing_else(self) -> None:
        net = estimated(conv_net(momentum=0))
        net[1].requires_grad_(False)
        fails(net, training(net), "momentum 0 stops only the updates", "1")

    def test_where_the_step_moves_a_statistic(self) -> None:
        net = estimated(conv_net())
        freeze(net)
        step = training(net)

        def vandal() -> None:
            step()
            net[4].running_var[2] += 1

        fails(net, vandal, r"^4: running_var\[2\] .* 1 of 8 channels changed")

    def test_where_the_step_moves_a_parameter(self) -> None:
        net = estimated(conv_net())
        freeze(net)
        step = training(net)

        def vandal() -> None:
            step()
            net[1].bias.data.add_(1e-6)

        fails(net, vandal, "^1: bias")

    def test_where_the_step_undoes_the_hold(self) -> None:
        net = estimated(conv_net())
        freeze(net)

        def convert() -> None:
            net[1] = nn.SyncBatchNorm.convert_sync_batchnorm(net[1])

        fails(net, convert, "^1: convert_sync_batchnorm")


class TestProvesNothing:
    def test_without_norms(self) -> None:
        fails(nn.Linear(2, 2), pytest.fail, "the model has no norm layer, so nothing is proved")

    def test_where_the_step_is_about_another_model(self) -> None:
        net, other = estimated(conv_net()), estimated(conv_net())
        freeze(net)
        fails(net, training(other), "so nothing is proved")
        fails(net, lambda: None, "so nothing is proved")

    def test_where_the_step_only_looks(self) -> None:
        net = estimated(conv_net())
        freeze(net)
        fails(net, torch.no_grad()(lambda: net.train()(data(4))), "so nothing is proved")

    def test_not_where_it_left_gradients_or_a_step_of_size_zero(self) -> None:
        net = estimated(conv_net())
        freeze(net)
        assert_frozen_through(net, lambda: net(data(4)).sum().backward())
        net.zero_grad()
        step = training(net, lr=0, weight_decay=0)

        def cleared() -> None:
            step()
            net.zero_grad()

        assert_frozen_through(net, cleared)


def test_a_compiled_step() -> None:
    net = estimated(conv_net())
    freeze(net)
    assert_frozen_through(net, training(torch.compile(net, backend="eager")))


def test_what_the_step_raises_is_the_users() -> None:
    net = estimated(conv_net())
    freeze(net)
    with pytest.raises(ZeroDivisionError):
        assert_frozen_through(net, lambda: 1 / 0)
