"""SN501: two ranks that hold other statistics see it, both the same; pooling makes them equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stillnorm import check
from stillnorm.errors import CalibrationError
from support import workers
from support.processes import in_processes


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return in_processes(workers.diverged)


def test_statistics_of_their_own_are_found_on_both_ranks_alike(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first["own"] == second["own"]
    ((severity, paths, evidence),) = first["own"]
    assert severity == "error"
    assert set(paths) == {"1", "3"}
    assert evidence["ranks"] == 2
    assert paths[0] == max(evidence["mean"], key=evidence["mean"].get)
    assert first["message"].startswith("2 ranks hold different statistics in 2 layers")
    assert first["left"]
    assert second["left"]


def test_the_size_is_in_deviations(ranks: list[dict[str, Any]]) -> None:
    a, b = (rank["before"] for rank in ranks)
    var = (a["1.running_var"] + b["1.running_var"]) / 2 + 1e-5
    expected = ((a["1.running_mean"] - b["1.running_mean"]).square() / var).mean().sqrt()
    ((_, _, evidence),) = ranks[0]["own"]
    assert evidence["mean"]["1"] == pytest.approx(float(expected), rel=1e-5)


def test_pooling_writes_the_moments_of_both_on_both(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["pooled"] for rank in ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)
    a, b = (rank["before"] for rank in ranks)
    mean = (a["1.running_mean"] + b["1.running_mean"]) / 2
    spread = (a["1.running_mean"] - mean).square()
    var = (a["1.running_var"] + b["1.running_var"]) / 2 + spread
    torch.testing.assert_close(first["1.running_mean"], mean)
    torch.testing.assert_close(first["1.running_var"], var)
    within = (a["3.running_var"] + b["3.running_var"]) / 2  # an instance norm's: no spread
    torch.testing.assert_close(first["3.running_var"], within)
    assert torch.equal(first["1.num_batches_tracked"], a["1.num_batches_tracked"])
    for rank in ranks:
        assert rank["after"] == []
        assert rank["undone"]


@pytest.mark.parametrize(
    "case",
    ["equal", "rounding", "half", "sync", "held", "no statistics", "lazy", "meta", "both NaN"],
)
def test_near_misses(ranks: list[dict[str, Any]], case: str) -> None:
    assert [rank[case] for rank in ranks] == [[], []]


def test_a_held_layer_that_differs_is_one_too(ranks: list[dict[str, Any]]) -> None:
    assert [(severity, paths) for severity, paths, _ in ranks[0]["held apart"]] == [
        ("error", ("1",))
    ]


def test_one_nan_is_a_difference_that_pooling_cannot_repair(ranks: list[dict[str, Any]]) -> None:
    assert [rank["one NaN"] for rank in ranks] == [[(("1",), None)]] * 2


def test_what_a_wrapper_writes_over_is_a_remark_unless_it_is_far(
    ranks: list[dict[str, Any]],
) -> None:
    severities = {
        case: [severity for severity, _, _ in ranks[0][case]]
        for case in ("broadcast", "broadcast, far", "no broadcast")
    }
    assert severities == {
        "broadcast": ["info"],
        "broadcast, far": ["error"],
        "no broadcast": ["error"],
    }


def test_ranks_with_other_models_cannot_be_compared(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["other model"] == "the ranks hold models with different norm layers"


def test_a_rank_that_fails_keeps_nobody_waiting(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first["rank 1 fails"].startswith("rank 1 failed: ")
    assert second["rank 1 fails"] == "raised"
    assert first["a batch that fails on rank 1"] == "done"
    assert second["a batch that fails on rank 1"] == "raised"


def test_without_a_group_no_other_rank_is_asked(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["alone"] == "needs group="
    (missed,) = check(nn.BatchNorm1d(2), select="SN501", group=None).not_run  # one process
    assert missed.reason == "needs group="


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(CalibrationError, match="there is no group 'all'"):
        check(nn.BatchNorm1d(2), group="all")  # type: ignore[arg-type]
