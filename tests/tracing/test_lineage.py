"""What the inputs of norms were computed from: data or weights, dropouts, which axis."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillnorm.norms import find_norms, probe_modes
from stillnorm.tracing import Lineage, Received, looking
from support.fingerprint import Fingerprint


def received(net: nn.Module, *inputs: Tensor) -> list[Received]:
    lineage = Lineage(net, find_norms(net), probe_modes(net).in_train)
    with looking(net):
        net.eval()
        with lineage.watching():
            net(*inputs)
    return lineage.received


class Net(nn.Module):
    """Calls a function on itself and its input, after which comes the norm."""

    def __init__(self, forward: Callable[..., Tensor], channels: int = 4) -> None:
        super().__init__()
        self.bn, self.other = nn.BatchNorm1d(channels), nn.BatchNorm1d(channels)
        self.fc, self.embedding = nn.Linear(4, 4), nn.Embedding(9, 4)
        self.drop, self.rnn = nn.Dropout(0.3), nn.LSTM(4, 4, batch_first=True)
        self.ln, self.w = nn.LayerNorm(4), nn.Parameter(torch.randn(6, 4))
        self.register_buffer("scale", torch.ones(4))
        self.function = forward

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.bn(self.function(self, *inputs))


X = torch.randn(6, 4)


def in_place(net: Net, x: Tensor) -> Tensor:
    made = torch.zeros_like(net.w)
    made[:3] = x[:3]
    return made


@pytest.mark.parametrize(
    ("function", "from_data"),
    [
        (lambda net, x: x, True),
        (lambda net, x: net.fc(x).relu(), True),
        (lambda net, x: net.w, False),
        (lambda net, x: (net.w * net.scale).reshape(6, 4).half().float(), False),
        (lambda net, x: torch.ones(6, 4) + net.w, False),
        (lambda net, x: net.w + x, True),
        (lambda net, x: torch.cat([net.w[:3], x[:3]]), True),
        (lambda net, x: torch.stack(net.w.split(2)).flatten(0, 1), False),
        (in_place, True),
    ],
)
def test_data_and_weights_are_told_apart(function: Callable[..., Tensor], from_data: bool) -> None:
    (seen,) = received(Net(function), X)
    assert seen.origin.from_data == from_data


@pytest.mark.parametrize(
    ("function", "probabilities"),
    [
        (lambda net, x: net.fc(x), []),
        (lambda net, x: net.drop(x), [0.3]),
        (lambda net, x: net.fc(net.drop(x)).relu(), [0.3]),
        (lambda net, x: F.dropout(net.drop(x), 0.2, net.training), [0.2, 0.3]),
        (lambda net, x: F.dropout(x, training=net.training), [0.5]),
        (lambda net, x: torch.dropout(x, 0.1, net.training), [0.1]),
        (lambda net, x: F.alpha_dropout(x, 0.1), [0.1]),
        (lambda net, x: x + net.fc(net.drop(x)), [0.3]),
        (lambda net, x: F.dropout(x, 0.0, net.training), []),
        (lambda net, x: F.dropout(x, 0.4, True), []),  # on in both modes
        (lambda net, x: net.ln(net.drop(x)), []),
        (lambda net, x: net.fc(net.other(net.drop(x))), []),
    ],
)
def test_dropouts_since_the_last_norm(
    function: Callable[..., Tensor], probabilities: list[float]
) -> None:
    *_, seen = received(Net(function), X)
    assert sorted(dropout.p for dropout in seen.origin.dropouts) == probabilities


def test_a_dropout_that_is_on_in_eval_mode_is_not_counted_and_others_are_turned_on() -> None:
    outputs = []

    def function(net: Net, x: Tensor) -> Tensor:
        outputs.append(net.drop(torch.ones(1000, 4)))
        return net.drop(x)

    received(Net(function), X)
    assert 0.2 < float((outputs[0] == 0).float().mean()) < 0.4


def test_a_dropout_that_train_leaves_off_stays_off() -> None:
    class Off(Net):
        def train(self, mode: bool = True) -> Off:
            super().train(mode)
            self.drop.eval()
            return self

    net = Off(lambda net, x: net.drop(x))
    (seen,) = received(net, X)
    assert seen.origin.dropouts == frozenset()


S = torch.randn(6, 5, 4)


@pytest.mark.parametrize(
    ("function", "last"),
    [
        (lambda net, x: net.fc(x), True),
        (lambda net, x: net.fc(x).relu() + x, True),
        (lambda net, x: net.drop(F.gelu(net.ln(x))), True),
        (lambda net, x: net.rnn(x)[0], True),
        (lambda net, x: net.embedding(x.argmax(2).abs()), True),
        (lambda net, x: x, False),
        (lambda net, x: net.fc(x).transpose(1, 2).contiguous().transpose(1, 2), False),
        (lambda net, x: net.fc(x).softmax(1), False),
    ],
)
def test_features_on_the_last_axis(function: Callable[..., Tensor], last: bool) -> None:
    (seen,) = received(Net(function, 5), S)
    assert seen.origin.features_last == last
    assert seen.shape == (6, 5, 4)


def test_a_transposed_square_is_no_longer_features_last() -> None:
    (seen,) = received(Net(lambda net, x: net.fc(x).transpose(1, 2)), torch.randn(6, 4, 4))
    assert not seen.origin.features_last


def test_the_layer_is_named_and_a_call_of_none_is_not() -> None:
    net = Net(lambda net, x: F.batch_norm(net.fc(x), None, None, training=True))
    function, layer = received(net, X)
    assert function.layer is None
    assert layer.layer is not None
    assert layer.layer.path == "bn"


def test_the_model_is_left_as_found() -> None:
    net = Net(lambda net, x: net.fc(net.drop(x))).train()
    before = Fingerprint(net)
    received(net, X)
    assert Fingerprint(net) == before
