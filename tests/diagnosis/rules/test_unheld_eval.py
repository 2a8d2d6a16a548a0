"""SN003: fires where the next train() thaws a layer, and only there."""

from __future__ import annotations

import torch
from torch import nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check, eval_mode, freeze, is_frozen
from support.zoo import torchvision


def singled_out() -> nn.Sequential:
    net = estimated(conv_net()).train()
    net[1].eval()
    return net


def test_a_norm_in_eval_while_its_parent_trains_is_found() -> None:
    assert found(check(singled_out())) == {"SN003": ("1",)}
    assert found(check(singled_out(), batches())) == {"SN003": ("1",)}


def test_what_it_says_is_true() -> None:
    net = singled_out()
    assert net.train()[1].training


def test_the_loop_of_thread_002_is_found_on_every_layer() -> None:
    net = torchvision.models.resnet18(num_classes=4).train()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.fill_(0.1)
            layer.eval()
    report = check(net)
    assert found(report).keys() == {"SN003"}
    assert len(report.findings[0].paths) == 20


class MyNet(nn.Module):
    """Thread 002, post 9: a train() that puts the layers back."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_net()

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.body[1].eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


class TestNearMisses:
    def silent(self, net: nn.Module) -> None:
        assert found(check(net, select="SN003")) == {}

    def test_a_model_in_eval(self) -> None:
        self.silent(estimated(conv_net()).eval())

    def test_a_model_in_train(self) -> None:
        self.silent(estimated(conv_net()).train())

    def test_held(self) -> None:
        net = estimated(conv_net()).train()
        freeze(net, "1")
        self.silent(net)

    def test_a_train_of_its_own_that_puts_it_back(self) -> None:
        self.silent(estimated(MyNet()).train())

    def test_a_foreign_frozen_layer(self) -> None:
        net = conv_net().train()
        net[1] = torchvision.ops.FrozenBatchNorm2d(8).eval()
        self.silent(net)

    def test_a_part_in_eval_as_a_whole(self) -> None:
        net = nn.Sequential(estimated(conv_net()), nn.Linear(4, 2)).train()
        net[0].eval()
        self.silent(net)

    def test_a_norm_that_normalises_by_the_batch_in_eval_too(self) -> None:
        net = conv_net(track_running_stats=False).train()
        net[1].eval()
        self.silent(net)

    def test_a_model_that_is_one_norm(self) -> None:
        self.silent(nn.BatchNorm2d(3).eval())


def test_the_fix_is_safe_holds_it_and_the_finding_is_gone() -> None:
    net = singled_out()
    with eval_mode(net):
        before = net(data())
    applied = check(net).fix()
    assert [code for code, _ in applied.fixes] == ["SN003"]
    assert found(check(net)) == {}
    assert is_frozen(net, "1")
    assert net[1].weight.requires_grad  # it was training, and it still is
    assert torch.equal(before, net.eval()(data()))
