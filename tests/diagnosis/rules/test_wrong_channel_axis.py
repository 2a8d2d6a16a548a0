"""SN208: (N, L, C) given to BatchNorm1d, and what was transposed before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net
from stillnorm import check
from stillnorm.diagnosis import Finding
from support.fingerprint import Fingerprint
from support.zoo import images, timm


def findings(net: nn.Module, x: object) -> list[Finding]:
    report = check(net, x, select="SN208")
    assert not report.crashed, report.crashed
    return list(report.findings)


class Captions(nn.Module):
    """Features of L positions, projected, normalised; `how` lays them out for the norm."""

    def __init__(self, length: int, how: str = "as they are") -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(8, 12), how
        self.bn = nn.BatchNorm1d(length if how == "as they are" else 12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x).relu()
        if self.how == "transposed":
            x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        elif self.how == "permuted":
            x = self.bn(x.permute(0, 2, 1).contiguous()).permute(0, 2, 1)
        elif self.how == "flattened":
            x = self.bn(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        else:
            x = self.bn(x)
        return self.head(x)


@pytest.mark.parametrize("length", [5, 12])
def test_features_on_the_last_axis_are_found(length: int) -> None:
    net, x = Captions(length), torch.randn(16, length, 8)
    before = Fingerprint(net)
    (finding,) = findings(net, x)
    assert Fingerprint(net) == before
    assert (finding.severity, finding.paths) == ("warning", ("bn",))
    assert finding.evidence == {"shapes": {"bn": [16, length, 12]}}
    assert f"axis 1 of (N, {length}, 12)" in finding.message


@pytest.mark.parametrize("layer", [nn.LSTM(8, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)])
def test_recurrent_layers(layer: nn.Module) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.bn = layer, nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.rnn(x)[0]).relu()

    assert [f.paths for f in findings(Net(), torch.randn(16, 5, 8))] == [("bn",)]


def test_embeddings() -> None:
    net = nn.Sequential(nn.Embedding(9, 8), nn.BatchNorm1d(5), nn.Flatten())
    assert [f.paths for f in findings(net, torch.randint(9, (16, 5)))] == [("1",)]


class TestNearMisses:
    @pytest.mark.parametrize("how", ["transposed", "permuted", "flattened"])
    @pytest.mark.parametrize("length", [5, 12])
    def test_laid_out_for_the_norm(self, how: str, length: int) -> None:
        assert findings(Captions(length, how), torch.randn(16, length, 8)) == []

    def test_sequences_from_a_convolution(self) -> None:
        net = nn.Sequential(nn.Conv1d(8, 6, 1), nn.BatchNorm1d(6), nn.ReLU())
        assert findings(net, torch.randn(16, 8, 6)) == []

    def test_the_raw_input(self) -> None:
        assert findings(nn.Sequential(nn.BatchNorm1d(5)), torch.randn(16, 5, 8)) == []

    def test_vectors_and_images(self) -> None:
        assert findings(conv_net(), batches()) == []
        net = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6))
        assert findings(net, torch.randn(16, 8)) == []

    def test_levit_flattens_before_its_norms(self) -> None:
        net = timm.create_model("levit_128s", num_classes=4, img_size=64)
        assert findings(net, images(2)) == []

    def test_it_has_to_be_asked_for(self) -> None:
        report = check(Captions(5), torch.randn(16, 5, 8))
        assert "SN208" not in {f.code for f in report.findings}
