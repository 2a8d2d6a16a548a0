"""SN503: what a conversion to SyncBatchNorm has dropped."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net
from stillnorm import check
from support.zoo import images, timm


class NormAct(nn.BatchNorm2d):
    """As timm's: a norm with an activation inside, and a dropout that is none."""

    def __init__(self, channels: int, act: nn.Module | None = None) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


def with_activations(act: nn.Module | None = None) -> nn.Sequential:
    net = conv_net()
    net[1], net[2] = NormAct(8, act), nn.Identity()
    return net


def converted(net: nn.Module) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(net)


def stripped(net: nn.Module, inputs: object = None) -> list[tuple[str, tuple[str, ...]]]:
    report = check(net, batches() if inputs is None else inputs, select="SN503")
    assert not report.crashed
    return [(f.severity, f.paths) for f in report.findings]


def test_a_lost_activation_is_found() -> None:
    net = converted(with_activations())
    assert type(net[1]) is nn.SyncBatchNorm
    assert stripped(net) == [("error", ("1",))]
    (finding,) = check(net, batches(), select="SN503").findings
    assert finding.evidence["children"] == {"1": {"act": "ReLU"}}


def test_what_it_says_is_true() -> None:
    torch.manual_seed(0)
    net, x = with_activations().eval(), batches()[0]
    before = net(x)
    assert not torch.allclose(converted(net)(x), before, atol=1e-3)


def test_timms_network_after_torchs_conversion_and_after_its_own() -> None:
    net = timm.create_model("efficientnet_lite0", num_classes=4)
    kept = timm.layers.convert_sync_batchnorm(timm.create_model("efficientnet_lite0"))
    x = images(2, size=32)
    assert stripped(net, x) == []
    assert stripped(kept, x) == []
    ((_, paths),) = stripped(converted(net), x)
    assert paths[0] == "bn1"
    assert len(paths) > 20


class TestNearMisses:
    def test_an_ordinary_conversion(self) -> None:
        assert stripped(converted(conv_net())) == []

    def test_an_activation_that_is_none(self) -> None:
        assert stripped(converted(with_activations(nn.Identity()))) == []

    def test_a_child_that_somebody_else_calls(self) -> None:
        class Outside(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = converted(with_activations())

            def forward(self, x: Tensor) -> Tensor:
                return self.net[1].act(self.net[:2](x)).mean((2, 3))

        assert stripped(Outside()) == []

    def test_a_layer_that_is_not_called(self) -> None:
        class Unused(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net, self.spare = conv_net(), converted(NormAct(3))

            def forward(self, x: Tensor) -> Tensor:
                return self.net(x)

        assert stripped(Unused()) == []

    def test_the_subclass_itself(self) -> None:
        assert stripped(with_activations()) == []

    def test_it_has_to_be_asked_for(self) -> None:
        net = converted(with_activations())
        assert "SN503" not in {f.code for f in check(net, batches()).findings}


@pytest.mark.parametrize("training", [True, False])
def test_looking_leaves_the_model_as_it_was(training: bool) -> None:
    net = converted(with_activations()).train(training)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    stripped(net)
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    assert all(module.training is training for module in net.modules())
