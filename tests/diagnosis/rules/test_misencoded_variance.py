"""SN110: what a converter wrote in place of the variance is told apart from all that is stale."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import estimated, found
from stillnorm import check, freeze
from stillnorm.diagnosis import Finding
from support.zoo import images, make

EPS = 1e-5
ENCODINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "deviation": torch.sqrt,
    "inverse deviation": lambda v: (v + EPS).rsqrt(),
    "inverse": lambda v: (v + EPS).reciprocal(),
}


def wide(n: int, seed: int, shape: tuple[int, ...] = ()) -> Tensor:
    """Inputs whose 16 channels differ in mean and, by orders of magnitude, in variance."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 16, *shape, generator=g)
    x = x + 0.5 * torch.randn(n, 16, *[1] * len(shape), generator=g)
    along = (1, 16, *[1] * len(shape))
    return torch.logspace(-1.5, 1.5, 16).view(along) * x + torch.linspace(-3, 4, 16).view(along)


def spread(layer: nn.Module) -> None:
    """Give the outputs of a layer scales that differ, as those of trained ones do."""
    with torch.no_grad():
        scales = torch.logspace(-1, 1, layer.weight.shape[0])
        layer.weight.mul_(scales.view(-1, *[1] * (layer.weight.dim() - 1)))


def images_net(dims: int) -> tuple[nn.Sequential, Callable[[int, int], Tensor]]:
    """Two norms, at "0" and "3", over rows, sequences, images or volumes."""
    torch.manual_seed(dims)
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims]
    conv = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims]
    middle = conv(16, 12) if dims == 0 else conv(16, 12, 1)
    spread(middle)
    net = nn.Sequential(norm(16), nn.ReLU(), middle, norm(12), nn.ReLU())

    def draw(n: int, seed: int) -> Tensor:
        return wide(n, seed, (4,) * dims)

    return estimated(net, draw(256, 1)), draw


def encode(layer: nn.Module, how: Callable[[Tensor], Tensor]) -> None:
    layer.running_var.copy_(how(layer.running_var))


def only(net: nn.Module, given: object) -> Finding:
    report = check(net, given)
    assert set(found(report)) == {"SN110"}, found(report)
    (finding,) = (f for f in report.findings if f.code == "SN110")
    return finding


@pytest.mark.parametrize("dims", range(4))
@pytest.mark.parametrize("name", ENCODINGS)
def test_each_encoding_is_told_at_its_own_layer(dims: int, name: str) -> None:
    for path in ("0", "3"):
        net, draw = images_net(dims)
        encode(net.get_submodule(path), ENCODINGS[name])
        finding = only(net, list(draw(128, 5).split(32)))
        assert finding.paths == (path,)
        assert finding.fix.option == name
        assert finding.fix.applicability == "unsafe"


def test_all_layers_are_one_finding_and_sn105_is_not_repeated() -> None:
    net, draw = images_net(2)
    for path in ("0", "3"):
        encode(net.get_submodule(path), torch.sqrt)
    finding = only(net, list(draw(128, 5).split(32)))
    assert finding.paths == ("0", "3")
    assert finding.message == "the running variance of 2 layers is a standard deviation"
    assert "SN105 on 0, 3" in finding.explains
    assert finding.evidence["layers"]["0"]["slope"] == pytest.approx(0.5, abs=0.05)


def test_two_encodings_are_two_findings() -> None:
    net, draw = images_net(2)
    encode(net[0], torch.sqrt)
    encode(net[3], ENCODINGS["inverse"])
    findings = check(net, list(draw(128, 5).split(32)), select="SN110").findings
    assert [(f.paths, f.fix.option) for f in findings] == [
        (("0",), "deviation"),
        (("3",), "inverse"),
    ]


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_layer_too_narrow_to_tell_is_named_with_those_that_tell(name: str) -> None:
    torch.manual_seed(0)
    middle = nn.Linear(16, 4, bias=False)
    net = nn.Sequential(nn.BatchNorm1d(16), middle, nn.BatchNorm1d(4), nn.Linear(4, 2))
    with torch.no_grad():
        middle.weight.mul_(torch.tensor([0.1, 0.2, 4.0, 8.0]).unsqueeze(1))
    estimated(net, wide(256, 1))
    alone = list(wide(128, 5).split(32))
    encode(net[2], ENCODINGS[name])
    assert set(found(check(net, alone))) == {"SN105"}
    encode(net[0], ENCODINGS[name])
    assert only(net, alone).paths == ("0", "2")


class TestOneFactor:
    @pytest.mark.parametrize("factor", [999.98, 0.01])
    def test_on_the_variances(self, factor: float) -> None:
        net, draw = images_net(2)
        given = list(draw(128, 5).split(32))
        for path in ("0", "3"):
            encode(net.get_submodule(path), lambda v: v * factor)
        finding = only(net, given)
        assert finding.fix.option == pytest.approx(1 / factor, rel=0.2)
        check(net, given).fix(unsafe=True)
        assert found(check(net, given)) == {}

    def test_on_means_too_is_caffes_and_has_no_fix(self) -> None:
        net, draw = images_net(2)
        for path in ("0", "3"):
            encode(net.get_submodule(path), lambda v: v * 999.98)
            net.get_submodule(path).running_mean.mul_(999.98)
        finding = only(net, list(draw(128, 5).split(32)))
        assert "so is the mean" in finding.message
        assert "divide running_mean and running_var by" in finding.help
        assert finding.fix is None


class TestNearMisses:
    def silent(self, net: nn.Module, given: Tensor) -> None:
        report = check(net, list(given.split(32)))
        assert not report.crashed
        assert "SN110" not in found(report)

    def test_healthy(self) -> None:
        for dims in range(4):
            net, draw = images_net(dims)
            self.silent(net, draw(128, 5))

    def test_one_layer_alone_off_by_a_factor(self) -> None:
        net, draw = images_net(2)
        encode(net[0], lambda v: v * 50)
        self.silent(net, draw(128, 5))

    @pytest.mark.parametrize("scale", [0.01, 3, 255])
    def test_an_input_of_another_scale(self, scale: float) -> None:
        """The variance is off by one factor, and the mean by its root."""
        net, draw = images_net(2)
        self.silent(net, scale * draw(128, 5))
        one = nn.Sequential(net[0])
        self.silent(one, scale * draw(128, 5))

    def test_two_inputs_of_another_scale(self) -> None:
        net = self.two()
        self.silent(net, 10 * wide(128, 5, (4, 4)))
        encode(net.a, lambda v: v * 100)  # one of a file's factor proves nothing beside the other
        encode(net.b, lambda v: v * 100)
        net.b.running_mean.mul_(10)
        self.silent(net, wide(128, 5, (4, 4)))

    def two(self) -> nn.Module:
        class Two(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b = images_net(2)[0][0], images_net(2)[0][0]

            def forward(self, x: Tensor) -> Tensor:
                return self.a(x) + self.b(x)

        return Two()

    @pytest.mark.parametrize("seed", range(5))
    def test_stale_statistics(self, seed: int) -> None:
        net, draw = images_net(2)
        g = torch.Generator().manual_seed(seed)
        for path in ("0", "3"):
            encode(
                net.get_submodule(path),
                lambda v: v * torch.randn(len(v), generator=g).exp(),
            )
        self.silent(net, draw(128, 5))

    def test_statistics_that_were_never_estimated(self) -> None:
        net, draw = images_net(2)
        for path in ("0", "3"):
            net.get_submodule(path).reset_running_stats()
        self.silent(net, draw(128, 5))

    def test_few_channels(self) -> None:
        net = estimated(nn.Sequential(nn.BatchNorm1d(4)), wide(256, 1)[:, ::4])
        encode(net[0], torch.sqrt)
        self.silent(net, wide(128, 5)[:, ::4])

    def test_variances_that_hardly_differ(self) -> None:
        """All near 16: a deviation of 4 and a variance off by a factor of 4 are the same."""
        x = 4 * torch.randn(384, 16, generator=torch.Generator().manual_seed(0))
        net = estimated(nn.Sequential(nn.BatchNorm1d(16)), x[:256])
        encode(net[0], torch.sqrt)
        self.silent(net, x[256:])

    def test_few_samples(self) -> None:
        net, draw = images_net(2)
        encode(net[0], torch.sqrt)
        self.silent(net, draw(31, 5))

    def test_wrong_means_beside_a_square_root(self) -> None:
        """Whoever wrote the variance wrote the mean too: here it is of something else."""
        net, draw = images_net(2)
        net[0].running_mean.add_(3 * net[0].running_var.sqrt())
        encode(net[0], torch.sqrt)
        self.silent(net, draw(128, 5))

    def test_held_instance_norm_and_no_statistics(self) -> None:
        net, draw = images_net(2)
        encode(net[0], torch.sqrt)
        freeze(net, "0")
        self.silent(net, draw(128, 5))
        self.silent(nn.Sequential(nn.InstanceNorm2d(16, track_running_stats=True)), draw(64, 5))
        self.silent(nn.Sequential(nn.BatchNorm2d(16, track_running_stats=False)), draw(64, 5))

    def test_values_that_are_no_numbers_or_negative(self) -> None:
        for bad in (torch.nan, torch.inf, -1.0):
            net, draw = images_net(2)
            encode(net[0], torch.sqrt)
            net[0].running_var[2] = bad
            self.silent(net, draw(128, 5))


@pytest.mark.parametrize("name", ENCODINGS)
def test_after_the_fix_the_finding_is_gone(name: str) -> None:
    net, draw = images_net(2)
    given = list(draw(128, 5).split(32))
    right = [net[i].running_var.clone() for i in (0, 3)]
    for path in ("0", "3"):
        encode(net.get_submodule(path), ENCODINGS[name])
    check(net, given).fix(unsafe=True)
    for i, var in zip((0, 3), right, strict=True):
        torch.testing.assert_close(net[i].running_var, var, rtol=1e-3, atol=2e-5)
    assert found(check(net, given)) == {}


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/lcnet_050"])
def test_a_real_architecture(name: str) -> None:
    model, both = make(name), ("SN105", "SN110")
    given = list(images(64, seed=9, size=32).split(32))
    estimated(model, images(128, seed=5, size=32)).eval()
    assert found(check(model, given, select=both)) == {}
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for layer in layers:
        encode(layer, ENCODINGS["inverse deviation"])
    report = check(model, given, select=both)
    assert len(found(report)["SN110"]) > len(layers) / 2
