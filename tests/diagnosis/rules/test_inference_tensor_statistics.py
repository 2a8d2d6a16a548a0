"""SN113: fires on buffers that cannot be written, and makes them ordinary."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check
from support.zoo import make


def made_there() -> nn.Sequential:
    with torch.inference_mode():
        return copy.deepcopy(estimated(conv_net()))


def test_a_model_copied_under_inference_mode() -> None:
    for report in (check(made_there()), check(made_there(), batches())):
        assert found(report) == {"SN113": ("1", "4")}


def test_it_is_what_torch_refuses() -> None:
    net = made_there()
    with pytest.raises(RuntimeError, match="nference"):
        net.train()(data(4))
    with pytest.raises(RuntimeError, match="nference"):
        net.load_state_dict(conv_net().state_dict())


def test_one_buffer_is_enough() -> None:
    net = estimated(conv_net())
    with torch.inference_mode():
        net[4].running_var = net[4].running_var.clone()
    assert found(check(net)) == {"SN113": ("4",)}


def test_in_any_family() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True), nn.BatchNorm3d(4))
    assert found(check(net)) == {"SN113": ("0", "1")}


class TestNearMisses:
    def test_an_ordinary_model_used_under_inference_mode(self) -> None:
        net = estimated(conv_net()).eval()
        with torch.inference_mode():
            net(data(4))
            assert found(check(net)) == {}
        assert found(check(net, batches())) == {}

    def test_layers_without_statistics(self) -> None:
        with torch.inference_mode():
            net = nn.Sequential(
                nn.LazyBatchNorm1d(),
                nn.BatchNorm1d(4, affine=False, track_running_stats=False),
                nn.InstanceNorm1d(4),
            )
        report = check(net, select="SN113")
        assert (found(report), report.crashed) == ({}, ())


def test_the_fix_is_safe_and_makes_it_trainable() -> None:
    net = made_there().eval()
    with torch.no_grad():
        before, keys = net(data(4)), list(net.state_dict())
    report = check(net)
    assert report.findings[0].fix.applicability == "safe"
    report.fix()
    with torch.no_grad():
        assert torch.equal(net(data(4)), before)
    assert list(net.state_dict()) == keys
    assert found(check(net)) == {}
    for layer in (net[0], net[3], net[8]):  # inference tensors too, and not norms
        layer.weight = nn.Parameter(layer.weight.clone())
        layer.bias = nn.Parameter(layer.bias.clone())
    net.train()(data(4)).sum().backward()
    assert net[1].weight.grad is not None


def test_in_a_real_network_at_its_own_layer() -> None:
    model = make("timm/resnet10t")
    assert found(check(model)) == {}
    with torch.inference_mode():
        model.layer2[0].bn1._apply(lambda t: t.clone())
    assert found(check(model)) == {"SN113": ("layer2.0.bn1",)}
