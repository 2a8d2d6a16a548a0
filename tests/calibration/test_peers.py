"""Failures of other recalibrators, each of them measured: here they do not happen.

fvcore's `update_bn_stats` (and its copies), `torch.optim.swa_utils.update_bn`, Lightning's and
mlcommons' use of them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from calibration.received import assert_exact, assert_statistics, recording
from stillnorm import recalibrate
from stillnorm.errors import BatchError, CalibrationError
from support.fingerprint import Fingerprint
from support.layers import conv_input, conv_net, settle
from support.oracles import pooled_moments


class Skipping(nn.Module):
    """A norm at one place, and one that the forward does not call."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


# ------------------------------------------------------------------ fvcore


def test_a_short_loader_is_no_error_and_leaves_no_momentum_and_no_hook() -> None:
    net = conv_net().train()
    batches = iter([conv_input()])
    before = Fingerprint(net, versions=False)
    recalibrate(net, batches).undo()
    assert not Fingerprint(net, versions=False).differences(before)


def test_a_reused_layer_is_no_error() -> None:
    layer = nn.BatchNorm2d(3)
    net = nn.Sequential(layer, nn.Conv2d(3, 3, 1), layer)
    with recording(net) as received:
        recalibrate(net, [conv_input(), conv_input(2)])
    assert_exact(received)


def test_a_layer_not_reached_does_not_get_variance_zero() -> None:
    net = Skipping()
    var = net.unused.running_var.clone()
    report = recalibrate(net, torch.randn(8, 3))
    assert report.unreached == ("unused",)
    assert torch.equal(net.unused.running_var, var)


def test_buffers_are_not_replaced() -> None:
    net = conv_net()
    ema = dict(net.named_buffers())
    pointers = {name: buffer.data_ptr() for name, buffer in ema.items()}
    recalibrate(net, [conv_input(), conv_input(2)])
    for name, buffer in net.named_buffers():
        assert buffer is ema[name]
        assert buffer.data_ptr() == pointers[name]


def test_a_model_in_eval_mode_is_not_a_silent_no_op() -> None:
    layer = nn.BatchNorm2d(3).eval()
    recalibrate(layer, conv_input())
    assert_statistics(layer, *pooled_moments([conv_input()]))


@pytest.mark.parametrize("ratio", [1e3, 3e3, 1e4])
def test_a_large_mean_does_not_make_the_variance_negative(ratio: float) -> None:
    # fvcore: 9 % off at 1e3 deviations, below zero from 3e3, and NaN outputs.
    layer = nn.BatchNorm2d(8)
    batches = [torch.randn(4, 8, 10, 10) + ratio for _ in range(4)]
    recalibrate(layer, batches)
    assert_statistics(layer, *pooled_moments(batches))
    assert layer.eval()(batches[0]).isfinite().all()


def test_a_small_variance_beside_a_large_mean_survives() -> None:
    layer, x = nn.BatchNorm1d(2), 1e3 + 1e-2 * torch.randn(64, 2)
    recalibrate(layer, x)
    assert_statistics(layer, *pooled_moments([x]))


def test_layers_without_statistics_are_no_error() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    assert len(recalibrate(net, torch.randn(8, 3)).layers) == 1


def test_pairs_and_mappings_are_batches() -> None:
    recalibrate(conv_net(), [(conv_input(), torch.zeros(4)), {"input": conv_input()}])


# ------------------------------------------------------------------ swa_utils.update_bn


def test_an_exception_leaves_momentum_and_modes() -> None:
    net = conv_net().eval()
    batches = [conv_input(), conv_input()[:, :, 0]]
    before = Fingerprint(net)
    with pytest.raises(BatchError):
        recalibrate(net, iter(batches))
    assert not Fingerprint(net).differences(before)


def test_an_empty_loader_does_not_reset_the_statistics() -> None:
    net = conv_net()
    before = Fingerprint(net)
    with pytest.raises(CalibrationError):
        recalibrate(net, [])
    assert not Fingerprint(net).differences(before)


def test_submodules_in_eval_mode_stay_so_and_dropout_stays_off() -> None:
    net = nn.Sequential(conv_net(), nn.Dropout(0.5)).train()
    net[0][3].eval()
    modes = [module.training for module in net.modules()]
    outputs: list[Tensor] = []
    net.register_forward_hook(lambda *args: outputs.append(args[2]))
    recalibrate(net, iter([conv_input(), conv_input()]))
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(*outputs)


def test_a_ragged_last_batch_of_one_is_no_error() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    rows = torch.randn(9, 4)
    batches = list(rows.split(4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        update_bn(batches, net)
    assert net[1].momentum is None, "what it leaves behind"
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    recalibrate(net, iter(batches))
    assert_statistics(net[1], *pooled_moments([net[0](rows).detach()]))


def test_a_ragged_last_batch_counts_for_what_it_is() -> None:
    # update_bn: mean 4.91 for 0.33, variance 0.40 for 3.55.
    batches = [torch.randn(64, 3), torch.randn(64, 3), torch.randn(3, 3) + 10]
    ours, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    recalibrate(ours, batches)
    assert_statistics(ours, *pooled_moments(batches))
    update_bn(batches, theirs)
    assert (theirs.running_mean - ours.running_mean).min() > 2, "the near miss of this test"


def test_sorted_classes_keep_the_spread_between_batches() -> None:
    # update_bn: 1.0 for 4.46, whatever the batch size.
    batches = [torch.randn(16, 3) + 2 * (i % 3) for i in range(12)]
    ours, theirs = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    recalibrate(ours, batches)
    assert_statistics(ours, *pooled_moments(batches))
    update_bn(batches, theirs)
    assert (theirs.running_var < 0.6 * ours.running_var).all(), "the near miss of this test"


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0, None])
def test_any_momentum_gives_the_same_and_is_kept(momentum: float | None) -> None:
    # Lightning #14866: momentum 0.0 taken for None, accuracy near zero.
    layer, x = nn.BatchNorm1d(3, momentum=momentum), [torch.randn(8, 3), torch.randn(5, 3)]
    recalibrate(layer, x)
    assert_statistics(layer, *pooled_moments(x))
    assert layer.momentum == momentum


def test_a_second_call_does_not_lose_the_momentum() -> None:
    # mlcommons/algorithmic-efficiency #783: the backup of momentum is overwritten.
    layer = nn.BatchNorm1d(3, momentum=0.03)
    for _ in range(2):
        recalibrate(layer, torch.randn(8, 3))
    assert layer.momentum == 0.03


def test_switched_off_tracking_is_recalibrated() -> None:
    layer, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    layer.track_running_stats = False
    recalibrate(layer, x)
    assert_statistics(layer, *pooled_moments([x]))
