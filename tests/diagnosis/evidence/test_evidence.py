"""The evidence is gathered without a trace, in the order of the forward, whatever goes wrong."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from diagnosis.nets import batches, conv_net, data, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.request import Request
from stillnorm.diagnosis.evidence.runs import run_flows
from stillnorm.errors import BatchError


class Everything:
    """All that looking must leave alone."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.tensors = [*net.parameters(), *net.buffers()]
        self.values = [(t.clone(), t._version, t.data_ptr()) for t in self.tensors]
        self.grads = [(p, p.requires_grad, p.grad) for p in net.parameters()]
        self.modules = [(m, type(m), m.training, len(m._forward_hooks)) for m in net.modules()]
        self.settings = [
            (m, m.momentum, m.track_running_stats)
            for m in net.modules()
            if isinstance(m, nn.BatchNorm2d)
        ]
        self.random = (torch.random.get_rng_state(), random.getstate())

    def assert_untouched(self) -> None:
        for tensor, (value, version, pointer) in zip(self.tensors, self.values, strict=True):
            assert torch.equal(tensor, value)
            assert (tensor._version, tensor.data_ptr()) == (version, pointer)
        assert all((p.requires_grad, p.grad) == (r, g) for p, r, g in self.grads)
        now = [(m, type(m), m.training, len(m._forward_hooks)) for m in self.net.modules()]
        assert now == self.modules
        assert all((m.momentum, m.track_running_stats) == (a, b) for m, a, b in self.settings)
        assert torch.equal(torch.random.get_rng_state(), self.random[0])
        assert random.getstate() == self.random[1]
        assert not torch.nn.modules.module._global_forward_pre_hooks


def mixed() -> nn.Sequential:
    """In train mode with one norm singled out, one frozen by parameter, gradients lying about."""
    net = estimated(conv_net()).train()
    net(data()).sum().backward()
    net[4].eval()
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    return net


def shuffled() -> DataLoader:
    return DataLoader(TensorDataset(data(), torch.zeros(64)), batch_size=16, shuffle=True)


def test_checking_leaves_everything_as_it_was() -> None:
    net = mixed()
    before = Everything(net)
    report = check(net, shuffled(), score=lambda out, batch: out.mean())
    assert report.findings
    before.assert_untouched()


def test_a_graph_recorded_before_can_still_run_backward() -> None:
    net = estimated(conv_net()).eval()
    loss = net(data()).sum()
    check(net, batches())
    loss.backward()


class Fails(Exception):
    pass


RUNS = 4 * 3  # four batches, three passes: eval, batch, recalibrated


@pytest.mark.parametrize("where", [1, 4, 6, 10, RUNS, RUNS + 1, RUNS + 2])
@pytest.mark.parametrize("error", [Fails, KeyboardInterrupt])
def test_an_exception_anywhere_leaves_everything_as_it_was(
    where: int, error: type[BaseException]
) -> None:
    net = mixed()
    calls = 0

    def forward(net: nn.Module, batch: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        out = net(batch)
        if calls == where:
            torch.rand(1)
            raise error
        return out

    before = Everything(net)
    if error is Fails and where > RUNS:  # in a rule: the others' findings stand
        assert check(net, batches(), forward=forward, select="SN001,SN105").crashed
    else:
        with pytest.raises((BatchError, KeyboardInterrupt)):
            check(net, batches(), forward=forward, select="SN001,SN105")
    assert calls >= where
    before.assert_untouched()


def test_a_score_that_raises_is_the_users_error() -> None:
    net = mixed()
    before = Everything(net)
    with pytest.raises(Fails):
        check(net, batches(), score=lambda out, batch: raise_(Fails()))
    before.assert_untouched()


def raise_(error: Exception) -> float:
    raise error


def gathered(net: nn.Module, batches: object, max_batches: int = 8, **how: object) -> Evidence:
    request = Request(net, batches, **how)
    return Evidence(request, run_flows(request, max_batches))


class TestWhatIsRun:
    def run(self, batches: object, **how: object) -> Evidence:
        return gathered(estimated(conv_net()), batches, **how)

    def test_only_as_many_batches_as_asked(self) -> None:
        runs = self.run(batches(size=8), max_batches=3).measured
        assert (len(runs.batches), runs.batch_sizes, runs.total) == (3, (8, 8, 8), None)

    def test_a_loader_says_how_many_there_are(self) -> None:
        assert self.run(shuffled(), max_batches=3).measured.total == 4

    def test_scores_weigh_by_samples(self) -> None:
        """Two batches of 16 and 8 with scores 1 and 4: (16 + 4 * 8) / 24."""
        got = self.run(
            [data(16), data(8)], score=lambda out, batch: 1.0 if len(batch) == 16 else 4.0
        ).measured.head
        assert (got.eval, got.batch, got.recalibrated) == (2.0, 2.0, 2.0)

    def test_no_batch_is_an_error(self) -> None:
        with pytest.raises(BatchError, match="no batch"):
            self.run([])

    def test_a_score_without_batches_is_an_error(self) -> None:
        with pytest.raises(BatchError, match="score= needs batches"):
            check(conv_net(), score=lambda out, batch: 0.0)

    def test_inputs_that_give_no_statistics_leave_two_scores(self) -> None:
        bad = data(32)
        bad[3] = torch.nan
        head = self.run([bad], score=lambda out, batch: 0.5).measured.head
        assert (head.eval, head.batch, head.recalibrated) == (0.5, 0.5, None)

    def test_where_everything_is_held_there_is_nothing_to_recalibrate(self) -> None:
        net = estimated(conv_net())
        freeze(net)
        seen = gathered(net, batches())
        assert "recalibrated" not in seen.measured.traces

    def test_layers_come_in_the_order_of_the_forward(self) -> None:
        class Backwards(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.last, self.first = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

            def forward(self, x: Tensor) -> Tensor:
                return self.last(self.first(x))

        seen = gathered(Backwards(), batches())
        assert [layer.path for layer in seen.in_order(seen.layers)] == ["first", "last"]
        assert seen.from_here(["first"]) == ("first", "last")
        assert seen.from_here(["last"]) == ("last",)
        assert [type(m).__name__ for m in seen.order] == ["BatchNorm2d"] * 2
        assert seen.order[0] is seen.model.first


def test_the_three_flows_are_what_they_say() -> None:
    net = estimated(conv_net())
    net[1].running_mean.fill_(3)
    seen = gathered(net, batches())
    first = seen.layers[0]
    used = {flow: {c.used for c in t.by_layer("1")} for flow, t in seen.measured.traces.items()}
    assert used == {"eval": {"running"}, "batch": {"batch"}, "recalibrated": {"running"}}
    x = net[0](data())
    expected = (x.mean((0, 2, 3)) - 3) / (net[1].running_var + first.eps).sqrt()
    size = expected.square().mean().sqrt().item()
    assert seen.distance(first, "batch").mean == pytest.approx(size, rel=0.02)
    assert seen.distance(first, "recalibrated").mean < 0.02
