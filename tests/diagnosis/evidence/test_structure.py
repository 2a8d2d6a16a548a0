"""The flow of data on the first batch: seen once, in any model, which is left as found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import conv_net, data
from stillnorm import check
from stillnorm.diagnosis.evidence.structure import Structure
from stillnorm.errors import BatchError
from stillnorm.norms import probe_modes
from support.fingerprint import Fingerprint
from support.zoo import torchvision


def structure(net: nn.Module, x: object = None) -> Structure:
    x = data() if x is None else x
    return Structure(net, x, None, probe_modes(net).in_train)


class Twice(nn.Module):
    """One norm after a weak dropout and after a strong one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.bn = nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16)
        self.weak, self.strong = nn.Dropout(0.1), nn.Dropout(0.6)
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        x = self.bn(self.fc(self.weak(x)))
        return self.bn(self.fc(self.strong(x)))


def test_of_a_shared_norm_the_worst_call_counts() -> None:
    (shift,) = structure(Twice(), torch.randn(2048, 16)).shifts
    assert shift.path == "bn"
    assert [dropout.p for dropout in shift.dropouts] == [0.6]
    assert shift.ratio == pytest.approx(1 / 0.4, rel=0.05)


def test_forwards_are_made_when_asked_for_and_once() -> None:
    net = Twice()
    seen = structure(net, torch.randn(8, 16))
    assert net.forwards == 0
    assert seen.received is seen.received
    assert net.forwards == 1
    assert seen.shifts is seen.shifts
    assert net.forwards == 1 + 4


def test_without_dropouts_one_forward_is_enough() -> None:
    net = Twice()
    net.weak = net.strong = nn.Identity()
    seen = structure(net, torch.randn(8, 16))
    assert seen.shifts == ()
    assert net.forwards == 1


def test_rules_that_are_not_chosen_cost_nothing() -> None:
    net = Twice()
    check(net, torch.randn(8, 16), select="SN108")
    before = net.forwards
    net.forwards = 0
    check(net, torch.randn(8, 16), select="SN108,SN208")
    assert net.forwards == before + 1


def test_foreign_frozen_layers_do_not_confuse_the_order() -> None:
    frozen = torchvision.ops.FrozenBatchNorm2d(3)
    net = nn.Sequential(frozen, nn.Dropout(0.5), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    assert [shift.path for shift in structure(net).shifts] == ["3"]


def test_a_forward_that_does_not_repeat_itself_shows_no_shift() -> None:
    class Restless(Twice):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            return self.bn(x) if self.forwards % 2 else x

    assert structure(Restless(), torch.randn(64, 16)).shifts == ()


def test_compiled_parts_are_seen() -> None:
    net = nn.Sequential(nn.Dropout(0.5), torch.compile(conv_net(), backend="eager"))
    assert [shift.path for shift in structure(net).shifts] == ["1.1"]


def test_an_error_in_the_forward_names_the_batch_and_changes_nothing() -> None:
    class Raising(Twice):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError

    net = Raising()
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    x = torch.randn(64, 16)
    random = torch.get_rng_state()
    with pytest.raises(BatchError, match="batch 0"):
        _ = structure(net, x).shifts
    assert all(torch.equal(state[name], tensor) for name, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_and_the_batch_are_left_as_found(training: bool) -> None:
    net = nn.Sequential(nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True), conv_net())
    net.train(training)
    x = data()
    before, copy = Fingerprint(net), x.clone()
    assert structure(net, x).shifts
    assert Fingerprint(net) == before
    assert torch.equal(x, copy)
