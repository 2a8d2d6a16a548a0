"""SN202: statistics in one memory, and layers under several names."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, estimated, found
from stillnorm import check, freeze
from support.zoo import make, torchvision


def aliased(net: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    report = check(net, select="SN202")
    assert not report.crashed
    return [(f.severity, f.paths) for f in report.findings]


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_an_assigned_buffer_is_found(name: str) -> None:
    net = conv_net()
    setattr(net[4], name, getattr(net[1], name))
    assert aliased(net) == [("warning", ("1", "4"))]


def test_two_layers_that_share_both_buffers_are_two_layers() -> None:
    net = conv_net()
    net[4].running_mean, net[4].running_var = net[1].running_mean, net[1].running_var
    assert aliased(net) == [("warning", ("1", "4"))]


def test_what_it_says_is_true() -> None:
    net = conv_net()
    net[4].running_mean = net[1].running_mean
    before = net[4].running_mean.clone()
    net[1].train()(3 + torch.randn(4, 8, 2, 2))
    assert not torch.equal(net[4].running_mean, before)


def test_two_groups_are_two_groups_and_others_are_left_out() -> None:
    net = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(6)))
    net[3].running_mean = net[0].running_mean
    net[4].running_mean = net[0].running_mean
    net[5].running_var = net[1].running_var
    ((severity, paths),) = aliased(net)
    assert severity == "warning"
    assert sorted(paths) == ["0", "1", "3", "4", "5"]


def test_overlapping_parts_of_one_buffer() -> None:
    net, whole = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), torch.zeros(7)
    net[0].running_mean, net[1].running_mean = whole[:4], whole[3:]
    assert aliased(net) == [("warning", ("0", "1"))]


class Named(nn.Module):
    """One norm under two names, called once or twice."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.net, self.calls = conv_net(), calls
        self.head = self.net[4]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net[:5]:
            x = layer(x)
        for _ in range(self.calls - 1):
            x = self.head(x)
        return x.mean((2, 3))


def test_one_layer_under_two_names_is_a_remark() -> None:
    report = check(Named(), batches(), select="SN202")
    (finding,) = report.findings
    assert (finding.severity, finding.paths) == ("info", ("net.4",))
    assert finding.note == "net.4 is also head"
    assert aliased(Named()) == [("info", ("net.4",))]


def test_it_explains_the_mismatch() -> None:
    net = estimated(conv_net())
    net[4].running_mean = net[1].running_mean
    net[1].running_mean += 9
    report = check(net, batches(), select="SN202,SN105")
    assert found(report) == {"SN202": ("1", "4")}


def test_an_injected_fault_in_a_real_model() -> None:
    net = make("torchvision/resnet18")
    net.layer1[1].bn1.running_var = net.layer1[0].bn1.running_var
    assert aliased(net) == [("warning", ("layer1.0.bn1", "layer1.1.bn1"))]


class TestNearMisses:
    def test_layers_that_share_weight_and_bias(self) -> None:
        net = conv_net()
        net[4].weight, net[4].bias = net[1].weight, net[1].bias
        assert aliased(net) == []

    def test_parts_of_one_buffer_that_do_not_overlap(self) -> None:
        net, whole = conv_net(), torch.zeros(16)
        net[1].running_mean, net[4].running_mean = whole[:8], whole[8:]
        assert aliased(net) == []

    def test_a_layer_called_twice_is_another_rules(self) -> None:
        report = check(Named(calls=2), batches(), select="SN202")
        assert report.findings == ()

    def test_frozen_layers_never_write(self) -> None:
        net = estimated(conv_net())
        net[4].running_mean = net[1].running_mean
        freeze(net)
        assert aliased(net) == []

    def test_foreign_frozen_layers(self) -> None:
        a, b = (torchvision.ops.FrozenBatchNorm2d(3) for _ in range(2))
        b.running_mean = a.running_mean
        assert aliased(nn.Sequential(a, b)) == []

    def test_copies(self) -> None:
        net = conv_net()
        assert aliased(nn.Sequential(net, copy.deepcopy(net))) == []

    def test_layers_without_memory(self) -> None:
        with torch.device("meta"):
            net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
        assert aliased(net) == []
        assert aliased(nn.Sequential(nn.LazyBatchNorm1d(), nn.LazyBatchNorm1d())) == []
        assert aliased(nn.Sequential(nn.BatchNorm1d(0), nn.BatchNorm1d(0))) == []
        assert aliased(conv_net(track_running_stats=False)) == []

    def test_instance_norm_without_statistics(self) -> None:
        assert aliased(nn.Sequential(nn.InstanceNorm2d(3), nn.InstanceNorm2d(3))) == []

    def test_a_model_without_norms(self) -> None:
        assert aliased(nn.Linear(2, 2)) == []
