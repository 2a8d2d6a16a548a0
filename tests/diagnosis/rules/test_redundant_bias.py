"""SN204: biases before norms; what the rule names, the fix absorbs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, data, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis import Finding
from support.fingerprint import Fingerprint
from support.zoo import images, make


def findings(net: nn.Module, inputs: object = None, **how: object) -> list[Finding]:
    report = check(net, batches() if inputs is None else inputs, select="SN204", **how)
    assert not report.crashed, report.crashed
    assert not report.not_run, report.not_run
    return list(report.findings)


CASES = {
    "linear": (nn.Linear(4, 6), nn.BatchNorm1d(6), (16, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (16, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), (16, 4, 9, 9)),
    "conv3d": (nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), (16, 4, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (16, 4, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (16, 4, 9, 9)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_a_bias_before_a_norm_is_found_and_absorbed(case: str, training: bool) -> None:
    layer, norm, shape = CASES[case]
    net = copy.deepcopy(nn.Sequential(layer, norm, nn.ReLU()))
    x = torch.randn(shape)
    net.train()(x)
    net.train(training)
    before = Fingerprint(net)
    (finding,) = findings(net, x)
    assert Fingerprint(net) == before
    assert (finding.severity, finding.paths) == ("info", ("1",))
    assert finding.evidence == {"biases": {"0": "1"}, "values": 6}
    expected = copy.deepcopy(net).eval()(x)
    check(net, x, select="SN204").fix(unsafe=True)
    assert net[0].bias is None
    torch.testing.assert_close(net.eval()(x), expected, rtol=1e-4, atol=1e-5)
    assert findings(net, x) == []


def test_the_gradient_is_zero_in_train_mode() -> None:
    net = conv_net().train()
    net(data()).square().sum().backward()
    assert net[0].bias.grad.abs().max() < 1e-4 * net[0].weight.grad.abs().max()


def test_all_in_one_finding_and_undo() -> None:
    net = estimated(conv_net())
    before = copy.deepcopy(net.state_dict())
    report = check(net, batches(), select="SN204")
    (finding,) = report.findings
    assert finding.paths == ("1", "4")
    applied = report.fix(unsafe=True)
    assert net[3].bias is None
    applied.undo()
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_a_real_model_has_is_absorbed_whole() -> None:
    net = make("torchvision/resnet18")
    x = images(8, size=32)
    assert findings(net, x) == []
    net.layer2[0].conv1.bias = nn.Parameter(torch.randn(128))
    report = check(net, x, select="SN204")
    assert [f.paths for f in report.findings] == [("layer2.0.bn1",)]
    report.fix(unsafe=True)
    assert findings(net, x) == []


def test_a_train_mode_that_cannot_be_called_leaves_it_undecided() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv_net()

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("targets should not be None")
            return self.net(x)

    report = check(Detector(), batches(), select="SN204")
    assert report.findings == ()
    assert "targets should not be None" in report.not_run[0].reason


def test_several_inputs_through_forward() -> None:
    net = conv_net()
    (finding,) = findings(net, [{"x": data()}], forward=lambda net, batch: net(batch["x"]))
    assert finding.paths == ("1", "4")


class Skipped(nn.Module):
    """The convolution's output is used beside the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (x + self.bn(x)).mean((2, 3))


class Twice(Skipped):
    """One convolution before the norm and elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).mean((2, 3)) + self.conv(x).mean((2, 3))


class TrainOnly(Skipped):
    """In train mode the output goes to a loss too."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.aux = x.square().mean() if self.training else None
        return self.bn(x).mean((2, 3))


class Between(Skipped):
    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).relu()).mean((2, 3))


class TestNearMisses:
    @pytest.mark.parametrize("kind", [Skipped, Twice, TrainOnly, Between])
    def test_biases_that_are_felt(self, kind: type[nn.Module]) -> None:
        assert findings(kind()) == []

    @pytest.mark.parametrize("length", [5, 6])
    def test_a_bias_along_an_axis_that_is_not_the_norms(self, length: int) -> None:
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(length))
        assert findings(net, torch.randn(16, length, 4)) == []

    def test_no_bias(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
        assert findings(net) == []

    def test_frozen_norms(self) -> None:
        net = estimated(conv_net())
        freeze(net, "1")
        (finding,) = findings(net)
        assert finding.paths == ("4",)

    def test_instance_and_layer_norm(self) -> None:
        net = conv_net()
        net[1], net[4] = nn.InstanceNorm2d(8, track_running_stats=True), nn.GroupNorm(2, 8)
        assert findings(net) == []

    def test_a_norm_without_statistics_to_move_it_into(self) -> None:
        assert findings(conv_net(track_running_stats=False)) == []
