"""SN209: padding at the end of sequences, and constants that are none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diagnosis.nets import batches, conv_net, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis import Finding
from support.fingerprint import Fingerprint

N, C, L = 16, 6, 32
LENGTHS = 6 + torch.arange(N) % 24


def findings(net: nn.Module, x: object) -> list[Finding]:
    report = check(net, x, select="SN209")
    assert not report.crashed, report.crashed
    return list(report.findings)


def padded(*shape: int, lengths: Tensor = LENGTHS, value: float = 0.0) -> Tensor:
    """Values around 2, and padding from each sample's length on; the last axis is L."""
    x = 2 + torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    beyond = torch.arange(shape[-1]) >= lengths[:, None]
    return x.masked_fill(beyond.view(N, *[1] * (len(shape) - 2), -1), value)


@pytest.mark.parametrize("shape", [(N, C, L), (N, C, 5, L), (N, C, 2, 3, L)])
@pytest.mark.parametrize("value", [0.0, -7.5])
def test_padding_is_found_and_measured(shape: tuple[int, ...], value: float) -> None:
    norm = {3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](C)
    net, x = nn.Sequential(norm), padded(*shape, value=value)
    before = Fingerprint(net)
    (finding,) = findings(net, x)
    assert Fingerprint(net) == before
    assert (finding.severity, finding.paths) == ("warning", ("0",))
    part = float((L - LENGTHS).sum()) / (N * L)
    assert finding.evidence["padding"]["0"] == pytest.approx(part)
    valid = x.movedim(1, -1)[(x != value).all(1)]
    moved = (x.movedim(1, -1).reshape(-1, C).mean(0) - valid.mean(0)) / valid.std(0)
    assert finding.evidence["mean_moved"] == pytest.approx(
        float(moved.square().mean().sqrt()), rel=0.01
    )


def test_it_is_found_after_a_convolution_with_a_bias() -> None:
    net = nn.Sequential(nn.Conv1d(C, 8, 1), nn.BatchNorm1d(8), nn.ReLU())
    assert [f.paths for f in findings(net, padded(N, C, L))] == [("1",)]


def test_sequences_flattened_into_rows() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm1d(C)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x.transpose(1, 2).flatten(0, 1)).view(N, L, C).mean(1)

    assert [f.paths for f in findings(Rows(), padded(N, C, L))] == [("bn",)]


class Masked(nn.Module):
    """Normalises the valid positions alone."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        mask = (x != 0).any(2)
        return self.bn(x[mask]).sum(1)


class TestNearMisses:
    def test_a_norm_that_masks(self) -> None:
        assert findings(Masked(), padded(N, C, L)) == []

    def test_no_padding(self) -> None:
        assert findings(conv_net(), batches()) == []

    def test_all_alike_is_a_margin(self) -> None:
        x = padded(N, C, L, lengths=torch.full((N,), 20))
        assert findings(nn.Sequential(nn.BatchNorm1d(C)), x) == []

    def test_a_picture_with_a_black_margin_all_around(self) -> None:
        g = torch.Generator().manual_seed(0)
        x = torch.zeros(N, 3, 16, 16)
        for i, margin in enumerate(torch.randint(2, 6, (N,), generator=g).tolist()):
            x[i, :, margin:-margin, margin:-margin] = 2
            x[i] += torch.randn(3, 16, 16, generator=g) * (x[i] != 0)
        assert findings(nn.Sequential(nn.BatchNorm2d(3)), x) == []

    def test_the_zeros_of_a_relu(self) -> None:
        x = F.relu(torch.randn(N, C, L) - 0.5)
        assert findings(nn.Sequential(nn.BatchNorm1d(C)), x) == []

    def test_one_channel_alone_that_ends_in_zeros(self) -> None:
        x = 2 + torch.randn(N, C, L)
        x[:, 0] = padded(N, C, L)[:, 0]
        assert findings(nn.Sequential(nn.BatchNorm1d(C)), x) == []

    def test_padding_that_changes_nothing(self) -> None:
        x = padded(N, C, L, lengths=30 + torch.arange(N) % 2)
        assert findings(nn.Sequential(nn.BatchNorm1d(C)), x) == []

    def test_frozen_and_instance_norms(self) -> None:
        net = estimated(nn.Sequential(nn.BatchNorm1d(C)), padded(N, C, L))
        freeze(net)
        assert findings(net, padded(N, C, L)) == []
        assert findings(nn.Sequential(nn.InstanceNorm1d(C)), padded(N, C, L)) == []

    @pytest.mark.parametrize("shape", [(1, C, L), (N, C), (N, C, 1)])
    def test_inputs_without_positions_or_mates(self, shape: tuple[int, ...]) -> None:
        assert findings(nn.Sequential(nn.BatchNorm1d(C)), torch.randn(shape)) == []

    def test_it_has_to_be_asked_for(self) -> None:
        report = check(nn.Sequential(nn.BatchNorm1d(C)), padded(N, C, L))
        assert "SN209" not in {f.code for f in report.findings}
