"""SN206: one value per channel, or two, and the last batch of an epoch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from diagnosis.nets import conv_net, data, estimated, found
from stillnorm import check, freeze
from stillnorm.diagnosis.rules import single_value_channel


def pooled() -> nn.Sequential:
    """A norm after global pooling, as in ASPP or a projection head."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def run(net: nn.Module, batches: object) -> dict[str, tuple[str, ...]]:
    return found(check(net, batches, select="SN206"))


@pytest.mark.parametrize("n", [1, 2])
def test_one_and_two_values_are_found(n: int) -> None:
    assert run(pooled(), data(n)) == {"SN206": ("2",)}


def test_what_it_says_is_true() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        pooled().train()(data(1))
    out = nn.BatchNorm1d(4).train()(100 * torch.randn(2, 4))
    torch.testing.assert_close(out.abs(), torch.ones(2, 4), rtol=1e-3, atol=0)


def loader(n: int, **how: object) -> DataLoader:
    return DataLoader(TensorDataset(data(n), torch.zeros(n)), batch_size=8, **how)


@pytest.mark.parametrize("max_batches", [2, None])
@pytest.mark.parametrize("left", [1, 2])
def test_the_last_batch_of_a_training_loader_is_found_read_or_not(
    max_batches: int | None, left: int
) -> None:
    report = check(
        pooled(), loader(32 + left, shuffle=True), max_batches=max_batches, select="SN206"
    )
    assert found(report) == {"SN206": ("2",)}
    assert f"last batch of every epoch, which has {left}" in report.findings[0].message
    assert report.findings[0].evidence["values"] == {"2": left}


DATA = TensorDataset(data(33), torch.zeros(33))
SAMPLERS = {
    "weighted": WeightedRandomSampler(torch.ones(33), 33),
    "subset": SubsetRandomSampler(range(33)),
    "distributed": DistributedSampler(DATA, num_replicas=1, rank=0),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_other_samplers_that_draw_at_random(name: str) -> None:
    batches = DataLoader(DATA, batch_size=8, sampler=SAMPLERS[name])
    assert found(check(pooled(), batches, max_batches=2, select="SN206")) == {"SN206": ("2",)}


@pytest.mark.parametrize("drop_last", [True, False])
def test_a_batch_sampler_of_ones_own(drop_last: bool) -> None:
    sampler = BatchSampler(RandomSampler(DATA), 8, drop_last)
    batches = DataLoader(DATA, batch_sampler=sampler)
    report = check(pooled(), batches, max_batches=2, select="SN206")
    assert found(report) == ({} if drop_last else {"SN206": ("2",)})


def test_the_batch_that_is_meant_is_named() -> None:
    """In a list, each batch is one of training."""
    report = check(pooled(), [data(16), data(2)], select="SN206")
    assert report.findings[0].message.startswith("2 values per channel in batches of 2:")


def test_a_loader_whose_every_batch_is_small() -> None:
    batches = DataLoader(TensorDataset(data(8), torch.zeros(8)), batch_size=2)
    assert run(pooled(), batches) == {"SN206": ("2",)}


def test_more_positions_than_one_in_the_last_batch() -> None:
    """Two samples left over, each with one value, or with nine."""
    net = nn.Sequential(nn.Conv2d(3, 4, 6), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    assert run(net, loader(34, shuffle=True)) == {}


def test_ranks_count_together_for_a_synchronised_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.SyncBatchNorm.convert_sync_batchnorm(pooled())
    assert run(net, data(2)) == {"SN206": ("2",)}
    monkeypatch.setattr(single_value_channel, "_ranks", lambda layer: 4)
    assert run(net, data(2)) == {}


class TestNearMisses:
    def test_three_values(self) -> None:
        assert run(pooled(), data(3)) == {}

    def test_one_image_with_many_positions(self) -> None:
        assert run(conv_net(), data(1)) == {}

    def test_a_loader_that_drops_its_last_batch(self) -> None:
        assert run(pooled(), loader(33, shuffle=True, drop_last=True)) == {}

    @pytest.mark.parametrize("max_batches", [2, None])
    def test_a_loader_that_does_not_shuffle_is_for_validation(
        self, max_batches: int | None
    ) -> None:
        report = check(pooled(), loader(33), max_batches=max_batches, select="SN206")
        assert found(report) == {}

    def test_a_distributed_sampler_that_does_not_shuffle(self) -> None:
        sampler = DistributedSampler(DATA, num_replicas=1, rank=0, shuffle=False)
        assert run(pooled(), DataLoader(DATA, batch_size=8, sampler=sampler)) == {}

    def test_instance_norm(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8))
        assert run(net, data(1)) == {}

    def test_a_last_batch_that_is_large_enough(self) -> None:
        assert run(pooled(), loader(35, shuffle=True)) == {}

    def test_a_held_layer(self) -> None:
        net = estimated(pooled())
        freeze(net)
        assert run(net, data(1)) == {}
