"""Recalibration shared by processes: the same on every rank, and as one process would do it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from stillnorm import recalibrate
from support import layers, workers
from support.processes import in_processes
from support.tolerances import STATISTICS_RTOL

Ranks = list[dict[str, Any]]
METHODS = ("pooled", "sequential")


@cache
def on(size: int) -> Ranks:
    return in_processes(workers.recalibrating, size)


@pytest.fixture(params=[2, 3], ids="{} processes".format)
def ranks(request: pytest.FixtureRequest) -> Ranks:
    return on(request.param)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("method", METHODS)
def test_every_rank_has_the_same_bits(ranks: Ranks, method: str) -> None:
    for rank in ranks[1:]:
        assert same_bits(rank[method]["state"], ranks[0][method]["state"])
        assert rank[method]["report"] == ranks[0][method]["report"]
        assert rank[method]["errors"] == ranks[0][method]["errors"]


@pytest.mark.parametrize("method", METHODS)
def test_as_one_process_over_all_batches(ranks: Ranks, method: str) -> None:
    net, batches = layers.conv_net(), workers.ragged_batches()
    report = recalibrate(net, batches, method=method)  # type: ignore[arg-type]
    for key, tensor in workers.tensors(net).items():
        got = ranks[0][method]["state"][key]
        torch.testing.assert_close(got, tensor, rtol=STATISTICS_RTOL, atol=1e-7)
    counts = [layer.count for layer in report.layers]
    assert ranks[0][method]["report"] == (5, sum(map(len, batches)), counts)
    errors = [layer.standard_error for layer in report.layers]
    assert ranks[0][method]["errors"] == pytest.approx(errors, rel=1e-6)


def test_pooled_takes_one_collective(ranks: Ranks) -> None:
    assert [rank["pooled"]["collectives"] for rank in ranks] == [1] * len(ranks)


@pytest.mark.parametrize("method", METHODS)
def test_wrapped_models_are_the_same_and_talk_no_more(ranks: Ranks, method: str) -> None:
    for rank in ranks:
        assert same_bits(rank[method]["wrapped"], rank[method]["state"])


@pytest.mark.parametrize("method", METHODS)
def test_where_one_rank_fails_all_raise_and_none_changes(ranks: Ranks, method: str) -> None:
    own, *others = (rank[method] for rank in ranks)
    assert own["failed"].startswith("CalibrationError: batch 1: 1 receives NaN")
    for other in others:
        assert "rank 0 failed: batch 1: 1 receives NaN" in other["failed"]
    assert all(rank[method]["untouched"] for rank in ranks)


def test_no_batch_on_any_rank(ranks: Ranks) -> None:
    assert all("there is no batch" in rank["nothing"] for rank in ranks)


def test_one_rank_alone_and_check_do_not_wait_for_the_others(ranks: Ranks) -> None:
    net = layers.conv_net()
    recalibrate(net, workers.ragged_batches())
    assert same_bits(ranks[0]["alone"], workers.tensors(net))
    assert ranks[0]["checked"] == 3


def test_a_group_of_some_ranks(ranks: Ranks) -> None:
    assert same_bits(ranks[0]["part"], ranks[-1]["part"])
    for key, tensor in ranks[0]["alone"].items():
        torch.testing.assert_close(ranks[0]["part"][key], tensor, rtol=1e-6, atol=1e-7)


def test_sync_batch_norm_normalises_by_the_ranks_own_batch(ranks: Ranks) -> None:
    for rank in ranks:
        assert same_bits(rank["synced"], rank["pooled"]["state"])
    assert any(isinstance(m, nn.SyncBatchNorm) for m in nn.SyncBatchNorm.convert_sync_batchnorm(
        layers.conv_net()).modules())  # fmt: skip


def test_sharded_models(ranks: Ranks) -> None:
    net, everything = layers.conv_net(), workers.ragged_batches()
    recalibrate(net, iter([everything[r + i] for r in range(len(ranks)) for i in (0, 1)]))
    for rank in ranks:
        assert "fully_shard has distributed the model" in rank["sharded"]["refused"]
        assert same_bits(rank["sharded"]["state"], ranks[0]["sharded"]["state"])
    for name, buffer in net.named_buffers():
        got = ranks[0]["sharded"]["state"][name]
        torch.testing.assert_close(got, buffer, rtol=1e-6, atol=1e-7)
