"""Norms that the model does not know are seen, and a look at the model updates nothing of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillnorm.tracing import strangers_kept, trace
from support.fingerprint import Fingerprint


class Hidden(nn.Module):
    """A norm in a plain list, one built anew, a function with tensors of its own, and a known one.

    The known one's statistics are given to a function while the layer itself is not called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.lent = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.listed = [nn.BatchNorm1d(3)]
        self.mean, self.var = torch.zeros(3), torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        x = self.listed[0](x)
        x = nn.BatchNorm1d(3)(x)
        x = F.batch_norm(x, self.mean, self.var, training=True)
        return F.batch_norm(x, self.lent.running_mean, self.lent.running_var)


X = 5 + torch.randn(16, 3)


def test_strays_say_who_made_them_and_what_was_used() -> None:
    net = Hidden()
    seen = trace(net, X)
    assert [call.path for call in seen.calls] == ["bn"]
    assert seen.unreached == ("lent",)
    listed, built, function, lent = seen.strays
    assert [s.used for s in seen.strays] == ["batch", "batch", "batch", "running"]
    assert listed.module is net.listed[0]
    assert built.module is not None
    assert built.module not in net.listed
    assert [s.module for s in (function, lent)] == [None, None]
    assert [s.layer and s.layer.path for s in seen.strays] == [None, None, None, "lent"]
    assert all(s.within[0] is net and s.shape == (16, 3) for s in seen.strays)
    assert [str(s.site).partition(":")[0] for s in seen.strays] == ["test_strangers.py"] * 4


def test_only_the_first_batch_shows_strays() -> None:
    assert len(trace(Hidden(), iter([X, X, X])).strays) == 4


@pytest.mark.parametrize("flow", ["eval", "batch", "as_is"])
def test_nothing_of_theirs_is_updated(flow: str) -> None:
    net = Hidden()
    before = Fingerprint(net.listed[0]), Fingerprint(net), net.mean.clone(), net.mean._version
    trace(net, iter([X, X]), flow=flow)
    assert Fingerprint(net.listed[0]) == before[0]
    assert Fingerprint(net) == before[1]
    assert torch.equal(net.mean, before[2])
    assert net.mean._version == before[3]


def test_without_it_they_would_be() -> None:
    net = Hidden()
    net(X)
    assert net.mean.abs().sum() > 0
    assert net.listed[0].num_batches_tracked == 1


def test_they_are_kept_through_an_exception() -> None:
    class Raising(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError

    net = Raising()
    with pytest.raises(KeyError), strangers_kept(net):
        net(X)
    assert net.listed[0].num_batches_tracked == 0
    assert net.mean.abs().sum() == 0


def test_what_they_compute_is_untouched() -> None:
    net = Hidden().eval()
    expected = net(X)
    net = Hidden().eval()
    with strangers_kept(net):
        assert torch.equal(net(X), expected)


def test_the_models_own_are_left_to_others() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3)).train()
    with strangers_kept(net):
        net(X)
    assert net[0].num_batches_tracked == 1
