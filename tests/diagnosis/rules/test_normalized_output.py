"""SN203: class scores that come out of a norm, and outputs that may."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagnosis.nets import found
from stillnorm import check, freeze


def scores(**norm: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, **norm))


def run(net: nn.Module, x: torch.Tensor | None = None) -> dict[str, tuple[str, ...]]:
    return found(check(net, torch.randn(32, 8) if x is None else x, select="SN203"))


def test_a_norm_on_the_scores_is_found() -> None:
    assert run(scores()) == {"SN203": ("1",)}


def test_a_view_of_it_is_still_its_output() -> None:
    """Thread 003 ends with `x = self.bn_5(x); x = x.view(-1, 10)`."""
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten())
    assert run(net, torch.randn(32, 3, 8, 8)) == {"SN203": ("1",)}


class TestNearMisses:
    def test_a_norm_inside(self) -> None:
        assert run(nn.Sequential(*scores(), nn.Linear(4, 2))) == {}

    def test_an_activation_after_it(self) -> None:
        assert run(nn.Sequential(*scores(), nn.ReLU())) == {}

    def test_a_projector_without_affine_parameters(self) -> None:
        assert run(scores(affine=False)) == {}

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_an_embedding_with_one_of_them_frozen(self, name: str) -> None:
        """A BNNeck freezes the bias, a face-recognition head the weight."""
        net = scores()
        getattr(net[1], name).requires_grad_(False)
        assert run(net) == {}

    def test_many_values(self) -> None:
        assert run(scores(), torch.randn(128, 8)) == {}
        maps = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        assert run(maps, torch.randn(4, 3, 16, 16)) == {}

    def test_held(self) -> None:
        net = scores()
        net(torch.randn(32, 8))
        freeze(net)
        assert run(net) == {}
