"""DistributedDataParallel, FSDP2 and SyncBatchNorm with two processes on gloo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support import workers
from support.processes import in_processes

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return in_processes(workers.everything)


def test_ddp_keeps_frozen_what_is_frozen_and_ranks_alike(ranks: Ranks) -> None:
    one, two = (rank["ddp"] for rank in ranks)
    for case, seen in one.items():
        assert seen["frozen"], case
        assert seen["held by"] == ["stillnorm"] * 4, case
        affine = [k for k in seen["after"] if k.endswith(("weight", "bias"))]
        moved = affine if case.startswith("trains") else []
        assert sorted(seen["moved"]) == sorted(moved), case
        assert torch.equal(seen["conv"], two[case]["conv"]), case
        for key, tensor in seen["after"].items():
            assert torch.equal(tensor, two[case]["after"][key]), (case, key)


def test_ddp_refuses_what_its_reducer_would_not_survive(ranks: Ranks) -> None:
    for seen in (rank["ddp_refusals"] for rank in ranks):
        paths = ["1", "3.1", "6", "9"]
        assert [path for path, _ in seen["freeze inside"]] == paths
        assert all("freeze first, then wrap" in reason for _, reason in seen["freeze inside"])
        assert seen["still live"]
        assert seen["trains inside"] == ()
        assert seen["unfreeze what learns"] == ()
        assert seen["find_unused_parameters"] == ()
        assert [path for path, _ in seen["unfreeze inside"]] == paths
        assert all("wrap again" in reason for _, reason in seen["unfreeze inside"])
        assert [path for path, _ in seen["learn again inside"]] == paths
        assert seen["unfreeze outside"] == ()


def test_fsdp2_keeps_frozen_what_is_frozen(ranks: Ranks) -> None:
    for seen in (rank["fsdp2"] for rank in ranks):
        for order, case in seen.items():
            assert case["frozen"], order
            assert case["same"], order
            assert case["learned"], order
            assert all("Held" in name for name in case["classes"]), order
        # Sharded after the freeze, its class is another: taking the hold away would take that too.
        assert [path for path, _ in seen["freeze first"]["refused"]] == ["1"]
        assert seen["shard first"]["refused"] == ()


def test_folding_trains_as_without_it(ranks: Ranks) -> None:
    for seen in (rank["folding"] for rank in ranks):
        refused = seen.pop("refused")
        assert "hook" in refused["1"]  # sharding hooks the convolution
        assert all(difference < 1e-6 for difference in seen.values()), seen


def test_a_held_sync_batch_norm_waits_for_nobody(ranks: Ranks) -> None:
    assert all(rank["sync_batch_norm"]["same"] for rank in ranks)


def test_split_norms_train_alike_on_every_rank(ranks: Ranks) -> None:
    one, two = (rank["split"] for rank in ranks)
    assert "do this first, then wrap" in one["refused"]
    for case in ("static_graph=False", "static_graph=True"):
        names = [name for name in one[case] if name.endswith(("weight", "bias"))]
        assert all(torch.equal(one[case][name], two[case][name]) for name in names)
        weights = [one[case][f"norm.sites.{i}.weight"] for i in (0, 1)]
        assert torch.equal(*weights)
        assert not torch.equal(weights[0], torch.ones(3)), "it has learned"
