"""SN603: what another library's frozen layer does, asked of the layer itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check
from stillnorm.diagnosis import Finding
from support.zoo import timm, torchvision, transformers

SEEN = "SN603"


class FrozenBatchNorm2d(nn.Module):
    """As it was first published: four buffers, no eps."""

    eps_used = 0.0

    def __init__(self, n: int = 8) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(n)
        self.register_buffer("weight", 0.5 + torch.rand(n, generator=g))
        self.register_buffer("bias", torch.randn(n, generator=g))
        self.register_buffer("running_mean", torch.randn(n, generator=g))
        self.register_buffer("running_var", 0.5 + torch.rand(n, generator=g))

    def scale(self) -> Tensor:
        return self.weight * (self.running_var + self.eps_used).rsqrt()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None] + shift[:, None, None]


class FrozenBatchNormIgnoresEps(FrozenBatchNorm2d):
    eps = 1e-3


class FrozenBatchNormOtherEps(FrozenBatchNorm2d):
    eps_used = eps = 1e-3


class FrozenBatchNormEpsOnDeviation(FrozenBatchNorm2d):
    eps = 1e-5

    def scale(self) -> Tensor:
        return self.weight / (self.running_var.sqrt() + self.eps)


class FrozenBatchNormLosesAct(FrozenBatchNorm2d):
    eps_used = eps = 1e-5

    def __init__(self, n: int = 8, act: nn.Module | None = None) -> None:
        super().__init__(n)
        self.act = nn.ReLU() if act is None else act


def net_with(layer: nn.Module) -> nn.Sequential:
    net = estimated(conv_net())
    net[1] = layer
    return net


def only(net: nn.Module, *given: object) -> Finding:
    report = check(net, *given, select=SEEN)
    assert not report.crashed, report.crashed
    (finding,) = report.findings
    return finding


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (FrozenBatchNorm2d(), "adds no eps, where BatchNorm adds an eps of 1e-05"),
        (FrozenBatchNormIgnoresEps(), "adds no eps, where BatchNorm adds an eps of 0.001"),
        (FrozenBatchNormEpsOnDeviation(), "eps is not added to the variance"),
        (FrozenBatchNormLosesAct(), "never calls its act"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_what_the_layer_does_is_said(layer: nn.Module, words: str) -> None:
    finding = only(net_with(layer))
    assert finding.paths == ("1",)
    assert finding.severity == "info"
    assert words in finding.message


def test_several_layers_are_one_finding() -> None:
    net = net_with(FrozenBatchNormLosesAct())
    net[4] = FrozenBatchNorm2d()
    finding = only(net, batches())
    assert finding.paths == ("1", "4")
    assert finding.evidence["layers"]["1"]["uncalled"] == ["act"]
    assert finding.evidence["layers"]["4"]["eps_added"] == 0
    assert finding.fix.paths == ("4",)


class TestHalfPrecision:
    """torchvision's layer returns the dtype of its buffers."""

    def test_a_half_model_around_float_buffers(self) -> None:
        net = net_with(torchvision.ops.FrozenBatchNorm2d(8))
        for module in (net[0], net[3], net[8]):
            module.bfloat16()
        assert "half precision comes out as float32" in only(net).message

    def test_half_precision_that_the_batches_show(self) -> None:
        class Autocast(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = net_with(torchvision.ops.FrozenBatchNorm2d(8))

            def forward(self, x: Tensor) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16):
                    return self.net(x)

        assert found(check(Autocast(), select=SEEN)) == {}
        assert "half precision" in only(Autocast(), batches()).message

    def test_not_where_all_is_float_or_all_is_half(self) -> None:
        net = net_with(torchvision.ops.FrozenBatchNorm2d(8))
        assert check(net, batches(), select=SEEN).findings == ()
        assert check(net.bfloat16(), select=SEEN).findings == ()

    def test_not_a_layer_that_returns_what_it_is_given(self) -> None:
        class FrozenBatchNormSameDtype(FrozenBatchNormOtherEps):
            def forward(self, x: Tensor) -> Tensor:
                return super().forward(x).to(x.dtype)

        net = net_with(FrozenBatchNormSameDtype())
        net[0].bfloat16()
        assert check(net, select=SEEN).findings == ()


class TestNearMisses:
    def silent(self, layer: nn.Module) -> None:
        assert check(net_with(layer), batches(), select=SEEN).findings == ()

    def test_layers_that_are_batch_norm(self) -> None:
        self.silent(torchvision.ops.FrozenBatchNorm2d(8))
        self.silent(timm.layers.FrozenBatchNormAct2d(8))
        self.silent(timm.layers.FrozenBatchNormAct2d(8, act_layer=nn.SiLU))
        self.silent(transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d(8))

    def test_another_eps_that_is_declared_and_added(self) -> None:
        self.silent(FrozenBatchNormOtherEps())
        self.silent(torchvision.ops.FrozenBatchNorm2d(8, eps=0.0))

    def test_a_module_inside_that_would_do_nothing(self) -> None:
        self.silent(FrozenBatchNormLosesAct(act=nn.Identity()))

    def test_torchs_own_layers(self) -> None:
        self.silent(nn.BatchNorm2d(8).eval())
        self.silent(nn.InstanceNorm2d(8))

    def test_layers_that_cannot_be_asked(self) -> None:
        class FrozenBatchNormOnRows(FrozenBatchNorm2d):
            def forward(self, x: Tensor) -> Tensor:
                if x.dim() != 2:
                    raise TypeError("rows only")
                return x

        net = nn.Sequential(FrozenBatchNormOnRows(), FrozenBatchNorm2d().to("meta"))
        net.append(nn.LazyBatchNorm1d())
        assert check(net, select=SEEN).findings == ()

    def test_an_empty_model(self) -> None:
        assert check(nn.Linear(2, 2), select=SEEN).findings == ()


def test_asking_calls_no_hook_and_moves_nothing() -> None:
    layer = FrozenBatchNormLosesAct()
    calls = []
    layer.register_forward_hook(lambda *args: calls.append(args))
    layer.act.register_forward_hook(lambda *args: calls.append(args))
    before = {name: (t, t.clone()) for name, t in layer.named_buffers()}
    only(net_with(layer))
    assert calls == []
    assert all(t is getattr(layer, n) and torch.equal(t, v) for n, (t, v) in before.items())


class TestFix:
    def test_a_held_batch_norm_with_the_eps_that_was_added(self) -> None:
        net = net_with(FrozenBatchNorm2d()).eval()
        before = net(data())
        report = check(net, batches(), select=SEEN)
        assert report.fix().fixes == ()
        report.fix(unsafe=True)
        assert isinstance(net[1], nn.BatchNorm2d)
        assert net[1].eps == 0
        torch.testing.assert_close(net(data()), before)
        assert check(net, batches(), select=SEEN).findings == ()

    def test_half_precision_stays_half(self) -> None:
        net = net_with(torchvision.ops.FrozenBatchNorm2d(8))[:3]
        net[0].bfloat16()
        check(net, select=SEEN).fix(unsafe=True)
        assert net.eval()(data().bfloat16()).dtype == torch.bfloat16
        assert check(net, select=SEEN).findings == ()

    @pytest.mark.parametrize(
        "layer",
        [FrozenBatchNormIgnoresEps(), FrozenBatchNormEpsOnDeviation(), FrozenBatchNormLosesAct()],
        ids=lambda x: type(x).__name__,
    )
    def test_none_where_batch_norm_would_compute_something_else(self, layer: nn.Module) -> None:
        assert only(net_with(layer)).fix is None


def test_a_detector_of_torchvision_is_silent() -> None:
    net = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d
    )
    assert check(net, select=SEEN).findings == ()
    net.body.layer2[0].bn1 = FrozenBatchNorm2d(128)
    assert only(net).paths == ("body.layer2.0.bn1",)
