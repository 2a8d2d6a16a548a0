"""SN008: fires where the flag and the statistics contradict each other, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check, freeze
from support.zoo import make, torchvision


def toggled(*paths: str) -> nn.Sequential:
    net = estimated(conv_net())
    for path in paths:
        net.get_submodule(path).track_running_stats = False
    return net


def test_a_flag_switched_off_is_found_with_and_without_data() -> None:
    assert found(check(toggled("4"))) == {"SN008": ("4",)}
    assert found(check(toggled("1", "4"), batches())) == {"SN008": ("1", "4")}


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_every_kind_of_batch_norm(kind: type[nn.Module]) -> None:
    net = nn.Sequential(kind(4))
    net[0].track_running_stats = False
    assert found(check(net)) == {"SN008": ("0",)}


def test_it_is_what_torch_does() -> None:
    """Train mode leaves the statistics alone, eval uses them."""
    layer = nn.BatchNorm1d(4)
    layer.track_running_stats = False
    x = 5 + torch.randn(64, 4)
    assert layer.train()(x).mean().abs() < 1e-5
    assert not layer.running_mean.any()
    assert layer.eval()(x).mean() > 4


def test_statistics_that_went_stale_are_its_consequence() -> None:
    net = toggled("4")
    net[4].running_mean += 2 * net[4].running_var.sqrt()
    report = check(net, batches())
    assert found(report) == {"SN008": ("4",)}
    finding = next(f for f in report.findings if f.code == "SN008")
    assert finding.evidence["mismatched"] == 1
    assert "SN105 on 4" in finding.explains
    assert "1 of 1 layer" in finding.note


def test_statistics_that_never_were_estimated_are_its_consequence() -> None:
    net = conv_net()
    net[1].track_running_stats = False
    assert found(check(net, batches())) == {"SN008": ("1",), "SN101": ("4",)}


class TestNearMisses:
    def silent(self, net: nn.Module) -> None:
        assert "SN008" not in found(check(net))

    def test_a_flag_that_is_on(self) -> None:
        self.silent(estimated(conv_net()))

    def test_a_layer_made_without_statistics(self) -> None:
        self.silent(conv_net(track_running_stats=False))

    def test_a_held_layer(self) -> None:
        net = toggled("1", "4")
        freeze(net)
        self.silent(net)

    def test_a_layer_that_its_model_keeps_in_eval(self) -> None:
        class Kept(nn.Sequential):
            def train(self, mode: bool = True) -> Kept:
                return super().train(False)

        self.silent(Kept(*toggled("1", "4")))

    def test_another_librarys_frozen_layer(self) -> None:
        self.silent(nn.Sequential(torchvision.ops.FrozenBatchNorm2d(8)))

    def test_instance_norm(self) -> None:
        layer = nn.InstanceNorm2d(8, track_running_stats=True)
        layer.track_running_stats = False
        self.silent(nn.Sequential(layer))

    def test_a_lazy_layer_and_one_on_the_meta_device(self) -> None:
        self.silent(nn.Sequential(nn.LazyBatchNorm2d()))
        self.silent(nn.Sequential(nn.BatchNorm2d(8, device="meta")))


def test_the_fix_tracks_and_estimates() -> None:
    net = toggled("4")
    net[4].running_mean += 2
    assert check(net).findings[0].fix is None
    report = check(net, batches())
    assert report.findings[0].fix.applicability == "unsafe"
    report.fix(unsafe=True)
    assert net[4].track_running_stats
    assert found(check(net, batches())) == {}


def test_in_a_real_network_at_its_own_layer() -> None:
    model = make("torchvision/resnet18")
    assert found(check(model)) == {}
    model.layer2[0].bn2.track_running_stats = False
    assert found(check(model)) == {"SN008": ("layer2.0.bn2",)}


def test_the_data_are_said_to_be_described_while_they_are() -> None:
    (finding,) = check(toggled("1"), [data(64)], select="SN008").findings
    assert "nothing is lost yet" in finding.note
