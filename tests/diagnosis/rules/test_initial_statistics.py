"""SN101: fires on statistics that were lost, and not on those not needed yet."""

from __future__ import annotations

import torch
from torch import nn

from diagnosis.nets import batches, conv_net, estimated, found
from stillnorm import check, freeze
from support.zoo import torchvision


def lost() -> nn.Sequential:
    """Loaded from a checkpoint of parameters only: trained affine, initial buffers."""
    net = conv_net()
    net.load_state_dict(dict(estimated(conv_net()).named_parameters()), strict=False)
    return net


def test_a_checkpoint_of_parameters_only_is_found() -> None:
    assert found(check(lost())) == {"SN101": ("1", "4")}


def test_data_that_say_otherwise_are_enough_for_an_untrained_layer() -> None:
    assert found(check(conv_net(), batches())) == {"SN101": ("1", "4")}


def test_one_lost_layer_among_healthy_ones_is_named_alone() -> None:
    net = estimated(conv_net())
    net[4].reset_running_stats()
    report = check(net, batches())
    assert found(report) == {"SN101": ("4",)}
    assert "SN105 on 4" in report.findings[0].explains


class TestNearMisses:
    def silent(self, net: nn.Module) -> None:
        assert found(check(net)) == {}

    def test_a_new_model(self) -> None:
        self.silent(conv_net())

    def test_a_last_gamma_of_zero(self) -> None:
        net = conv_net()
        nn.init.zeros_(net[4].weight)
        self.silent(net)

    def test_a_real_network_with_zero_initialised_residual_branches(self) -> None:
        net = torchvision.models.resnet18(zero_init_residual=True)
        assert not net.layer1[0].bn2.weight.any()
        self.silent(net)

    def test_a_zero_gamma_where_the_data_are_what_they_should_be(self) -> None:
        net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 2))
        nn.init.zeros_(net[0].weight)
        x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        assert found(check(net, list(x.split(16)), select="SN101")) == {}

    def test_a_layer_without_channels(self) -> None:
        self.silent(nn.Sequential(nn.BatchNorm1d(0)))

    def test_weights_drawn_at_random_as_gans_do(self) -> None:
        net = conv_net()
        nn.init.normal_(net[1].weight, 1.0, 0.02)
        self.silent(net)

    def test_a_legacy_checkpoint_with_a_count_of_zero(self) -> None:
        net = estimated(conv_net())
        net[1].num_batches_tracked.zero_()
        self.silent(net)

    def test_statistics_folded_into_the_affine_parameters(self) -> None:
        """With data: whoever receives mean 0 and variance 1 is described by mean 0, variance 1."""
        net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 2))
        with torch.no_grad():
            net[0].bias.normal_()
        assert found(check(net, list(torch.randn(64, 3, 8, 8).split(16)))) == {}

    def test_frozen_ones_are_another_finding(self) -> None:
        net = lost()
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            freeze(net)
        assert found(check(net)).keys() == {"SN004"}


def test_the_fix_needs_the_batches_and_makes_the_finding_go_away() -> None:
    assert check(lost()).findings[0].fix is None
    net = lost()
    check(net, batches()).fix(unsafe=True)
    assert found(check(net, batches())) == {}
