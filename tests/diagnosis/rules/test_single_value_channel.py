"""SN206: one value per channel, or two, and the last batch of an epoch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from diagnosis.nets import conv_net, data, estimated, found
from stillnorm import check, freeze


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


def test_the_last_batch_of_a_training_loader_is_found_though_it_was_not_read() -> None:
    report = check(pooled(), loader(33, shuffle=True), max_batches=2, select="SN206")
    assert found(report) == {"SN206": ("2",)}
    assert "last batch of every epoch, which has 1" in report.findings[0].message


class TestNearMisses:
    def test_three_values(self) -> None:
        assert run(pooled(), data(3)) == {}

    def test_one_image_with_many_positions(self) -> None:
        assert run(conv_net(), data(1)) == {}

    def test_a_loader_that_drops_its_last_batch(self) -> None:
        assert run(pooled(), loader(33, shuffle=True, drop_last=True)) == {}

    def test_a_loader_that_does_not_shuffle_is_for_validation(self) -> None:
        report = check(pooled(), loader(33), max_batches=2, select="SN206")
        assert found(report) == {}

    def test_a_last_batch_that_is_large_enough(self) -> None:
        assert run(pooled(), loader(35, shuffle=True)) == {}

    def test_a_held_layer(self) -> None:
        net = estimated(pooled())
        freeze(net)
        assert run(net, data(1)) == {}
