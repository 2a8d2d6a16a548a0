"""SN301: fires on gradient checkpointing in train mode, and on no other second forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diagnosis import steps
from diagnosis.nets import conv_net, data, estimated, found
from stillnorm import check, freeze, no_updates
from stillnorm.diagnosis import Finding
from support.fingerprint import Fingerprint
from support.zoo import torchvision


def of(net: nn.Module, train_step: Any, x: Tensor | None = None) -> list[Finding]:
    x = data(16) if x is None else x
    report = check(net, x, train_step=train_step, select="SN301")
    assert not report.crashed
    return list(report.findings)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", [steps.checkpointed, steps.checkpointed_in_parts])
def test_both_kinds_of_checkpointing(make: Any, reentrant: bool) -> None:
    net = estimated(conv_net()).train()
    before = Fingerprint(net)
    (finding,) = of(net, make(steps.sgd(net), reentrant))
    assert finding.paths == ("1", "4")
    assert finding.evidence == {"layers": 2, "momentum": 0.1, "acts as": 0.19}
    assert finding.note == "momentum 0.1 acts as 0.19"
    assert finding.where
    assert Fingerprint(net).differences(before) == []


def test_one_stage_of_a_resnet() -> None:
    net = torchvision.models.resnet18(num_classes=4)
    stage = net.layer2

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        model.layer2 = Checkpointed(stage)
        return model(x)

    (finding,) = of(net, steps.plain(steps.sgd(net), forward), torch.randn(4, 3, 32, 32))
    assert len(finding.paths) == 5
    assert all(path.startswith("layer2.") for path in finding.paths)


class Checkpointed(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inside, x, use_reentrant=False)


def test_what_it_says_of_the_statistics_is_so() -> None:
    """One batch, once checkpointed and once with the momentum that it acts as."""
    net, twin = estimated(conv_net()).train(), estimated(conv_net()).train()
    twin.load_state_dict(net.state_dict())
    steps.checkpointed(steps.sgd(net), reentrant=False)(net, data(16))
    twin[1].momentum = 0.19
    steps.plain(steps.sgd(twin))(twin, data(16))
    torch.testing.assert_close(net[1].running_mean, twin[1].running_mean)


def test_the_advice_makes_up_for_it() -> None:
    net, twin = estimated(conv_net()).train(), estimated(conv_net()).train()
    twin.load_state_dict(net.state_dict())
    for layer in (net[1], net[4]):
        layer.momentum = 1 - (1 - layer.momentum) ** 0.5
    checkpointed = steps.checkpointed(steps.sgd(net), reentrant=False)
    assert of(net, checkpointed) == []
    checkpointed(net, data(16))
    steps.plain(steps.sgd(twin))(twin, data(16))
    torch.testing.assert_close(net[4].running_var, twin[4].running_var)


NEAR_MISSES: dict[str, Any] = {
    "plain": steps.plain,
    "accumulating": steps.accumulating,
    "siamese": steps.siamese,
    "multi-crop": steps.multi_crop,
    "SAM": steps.sam,
    "validating": steps.validating,
    "gradient penalty": steps.penalised,
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    net = estimated(conv_net()).train()
    assert of(net, NEAR_MISSES[name](steps.sgd(net))) == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_that_do_not_update(reentrant: bool) -> None:
    for change in (
        lambda net: net.eval(),
        lambda net: freeze(net),
        lambda net: [setattr(net[i], "momentum", 0.0) for i in (1, 4)],
        lambda net: [setattr(net[i], "track_running_stats", False) for i in (1, 4)],
    ):
        net = estimated(conv_net()).train()
        change(net)
        assert of(net, steps.checkpointed(steps.sgd(net), reentrant)) == []


def test_a_whole_step_in_no_updates() -> None:
    net = estimated(conv_net()).train()
    step = steps.checkpointed(steps.sgd(net), reentrant=False)

    def train_step(model: nn.Module, x: Tensor) -> None:
        with no_updates(model):
            step(model, x)

    assert of(net, train_step) == []


def test_an_instance_norm_and_a_cumulative_average() -> None:
    net = estimated(conv_net())
    net[1] = nn.InstanceNorm2d(8, track_running_stats=True)
    net[4].momentum = None
    (finding,) = of(net.train(), steps.checkpointed(steps.sgd(net), reentrant=False))
    assert finding.paths == ("1", "4")


def test_it_needs_the_step() -> None:
    report = check(conv_net(), data(16), select="SN301")
    assert [missed.reason for missed in report.not_run] == ["needs train_step="]
    assert found(report) == {}
