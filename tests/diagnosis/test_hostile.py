"""Models and data that are legal and unusual: nothing is changed, and no rule fails."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from stillnorm import check
from stillnorm.diagnosis import Report
from stillnorm.errors import BatchError, StateError
from support.fingerprint import Fingerprint


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2))


def looked_at(net: nn.Module, data: object, **how: object) -> Report:
    before = Fingerprint(net)
    report = check(net, data, **how)
    assert not Fingerprint(net).differences(before)
    assert report.crashed == ()
    return report


class Calls(nn.Module):
    """The small network, called in a way of its own."""

    def __init__(self, how: object) -> None:
        super().__init__()
        self.net, self.how = small(), how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.net, x)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> None:
        raise NotImplementedError


@pytest.mark.parametrize(
    "how",
    [
        lambda net, x: checkpoint(net, x, use_reentrant=False),
        lambda net, x: net(x.detach().requires_grad_()),
        lambda net, x: net[3](NoBackward.apply(net[:3](x))),
        lambda net, x: net(x).exp().mul_(2),
        lambda net, x: net(x.div_(255).sub_(0.5)),
        lambda net, x: net(x).to_sparse(),
        lambda net, x: torch.complex(net(x), net(x)),
    ],
    ids=["checkpoint", "own gradient", "no backward", "in place", "input", "sparse", "complex"],
)
def test_a_forward_of_its_own_kind_is_looked_at_and_left_alone(how: object) -> None:
    x = torch.randn(24, 3)
    before = x.clone()
    report = looked_at(Calls(how), x)
    assert torch.equal(x, before)
    assert report.verdict is not None


def test_inside_inference_mode() -> None:
    with torch.inference_mode():
        looked_at(small(), torch.randn(24, 3))


def test_a_parameter_made_in_inference_mode_keeps_its_flag() -> None:
    net = small()
    with torch.inference_mode():
        net[1].weight = nn.Parameter(net[1].weight.clone())
    check(net, torch.randn(24, 3))
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_sparse_buffers_stand_in_nobodys_way() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("edges", torch.eye(24).to_sparse())
            self.register_buffer("n", torch.zeros(()))
            self.net = small()

        def forward(self, x: Tensor) -> Tensor:
            self.n += 1
            return self.net(torch.sparse.mm(self.edges, x))

    net = Graph()
    assert check(net, torch.randn(24, 3)).crashed == ()
    assert net.n == 0


def test_another_threads_model_is_not_touched() -> None:
    net, other = small(), small().train()

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        thread = threading.Thread(target=other, args=(torch.randn(24, 3),))
        thread.start()
        thread.join()
        return model(x)

    before = int(other[1].num_batches_tracked)
    check(net, torch.randn(24, 3), forward=forward)
    assert int(other[1].num_batches_tracked) > before


def test_another_threads_training_is_not_put_back() -> None:
    net, other = small(), small()
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)

    def elsewhere() -> None:
        other(torch.randn(24, 3)).sum().backward()
        optimizer.step()

    def step(model: nn.Module, x: Tensor) -> None:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        model(x).sum().backward()

    before = other[0].weight.detach().clone()
    check(net, torch.randn(24, 3), train_step=step)
    assert not torch.equal(other[0].weight, before)
    assert len(optimizer.state) == 6


def test_a_loaders_own_generator_draws_the_epoch_that_it_would_have() -> None:
    def loader() -> DataLoader:
        g = torch.Generator().manual_seed(3)
        return DataLoader(TensorDataset(torch.randn(64, 3)), 16, shuffle=True, generator=g)

    torch.manual_seed(0)
    looked, untouched = loader(), None
    torch.manual_seed(0)
    untouched = loader()
    check(small(), looked)
    assert all(torch.equal(a, b) for (a,), (b,) in zip(looked, untouched, strict=True))


def test_traces_and_nonsense_are_refused() -> None:
    with pytest.raises(StateError, match="a trace of TorchScript"):
        check(torch.jit.trace(small(), torch.randn(4, 3)))
    with pytest.raises(BatchError, match="max_batches is -1"):
        check(small(), torch.randn(4, 3), max_batches=-1)
