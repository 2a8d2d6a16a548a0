"""SN004: fires on a frozen identity, and not where 0 and 1 are right."""

from __future__ import annotations

import warnings

import torch
from torch import nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check, freeze, is_frozen
from stillnorm.errors import StillnormWarning
from support.zoo import torchvision


def fresh_and_held() -> nn.Sequential:
    net = conv_net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StillnormWarning)
        freeze(net)
    return net


def test_held_before_it_was_estimated() -> None:
    assert found(check(fresh_and_held())) == {"SN004": ("1", "4")}
    assert found(check(fresh_and_held(), batches())) == {"SN004": ("1", "4")}


def test_thread_002_post_8_in_eval_inside_a_training_model() -> None:
    net = conv_net().train()
    net[1].eval()
    assert found(check(net, select="SN004")) == {"SN004": ("1",)}


def test_a_backbone_in_eval_as_a_whole_inside_a_training_model() -> None:
    net = nn.Sequential(conv_net(), nn.Linear(4, 2)).train()
    net[0].eval()
    assert found(check(net, select="SN004")) == {"SN004": ("0.1", "0.4")}


def test_a_foreign_frozen_layer_that_was_never_loaded() -> None:
    net = estimated(conv_net())
    net[1] = torchvision.ops.FrozenBatchNorm2d(8)
    assert found(check(net)) == {"SN004": ("1",)}
    assert check(net, batches()).findings[0].fix is None


def test_a_zero_gamma_beside_a_zero_bias_is_not_learned() -> None:
    """Zero-initialised is as little a sign of training as one is."""
    net = estimated(conv_net())
    net[1] = torchvision.ops.FrozenBatchNorm2d(8)
    net[1].weight.zero_()
    assert found(check(net)) == {"SN004": ("1",)}


class TestNearMisses:
    def test_estimated_and_held(self) -> None:
        net = estimated(conv_net())
        freeze(net)
        assert found(check(net, batches())) == {}

    def test_a_fresh_model_that_nobody_froze(self) -> None:
        for net in (conv_net().train(), conv_net().eval()):
            assert found(check(net)) == {}

    def test_statistics_folded_into_the_affine_parameters(self) -> None:
        """A Caffe checkpoint: mean 0 and variance 1 beside learned weight and bias."""
        net = estimated(conv_net())
        net[1] = torchvision.ops.FrozenBatchNorm2d(8)
        net[1].weight.uniform_(0.5, 2)
        net[1].bias.normal_()
        assert found(check(net)) == {}

    def test_a_fresh_model_with_zero_initialised_residual_branches(self) -> None:
        net = torchvision.models.resnet18(zero_init_residual=True).train()
        assert found(check(net)) == {}

    def test_a_layer_without_channels(self) -> None:
        net = nn.Sequential(nn.BatchNorm1d(0)).train()
        net[0].eval()
        assert found(check(net, select="SN004")) == {}

    def test_data_for_which_the_identity_is_right(self) -> None:
        net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 2)).train()
        net[0].eval()
        x = torch.randn(64, 3, 8, 8)
        assert found(check(net, list(x.split(16)), select="SN004")) == {}

    def test_a_layer_that_no_batch_reaches(self) -> None:
        net = estimated(conv_net())
        net.unused = nn.BatchNorm2d(4)
        net.train()
        net.unused.eval()
        report = check(net, batches(), forward=lambda net, x: net[:9](x), select="SN004")
        assert found(report) == {}


def test_the_fix_estimates_and_holds_again() -> None:
    net = fresh_and_held()
    report = check(net, batches())
    report.fix(unsafe=True)
    assert found(check(net, batches())) == {}
    assert is_frozen(net)
    assert not net[1].weight.requires_grad  # frozen with the hold, and still so


def test_the_fix_leaves_the_held_layers_a_chain_that_fits() -> None:
    """The second layer's statistics are of what the first makes once it is estimated."""
    net = fresh_and_held()
    check(net, batches(size=64)).fix(unsafe=True)
    inside = net[:4].eval()(data())
    mean = inside.mean((0, 2, 3))
    torch.testing.assert_close(net[4].running_mean, mean, rtol=1e-3, atol=1e-3)
