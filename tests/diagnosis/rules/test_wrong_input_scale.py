"""SN106: the first norm tells how the input was prepared, and in which way it is now."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import conv_net, estimated, found
from stillnorm import check, freeze
from stillnorm.diagnosis import Finding
from support.fingerprint import Fingerprint
from support.zoo import make, torchvision

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)

Prepare = Callable[[Tensor], Tensor]


def unit(n: int = 64, seed: int = 1, size: int = 8) -> Tensor:
    """Images in 0..1, warm in colour and dark at the bottom, each with its own brightness."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randn(n, 3, 4, 4, generator=g)
    x = nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
    light = torch.randn(n, 1, 1, 1, generator=g) + torch.linspace(0.5, -0.5, size).view(-1, 1)
    tint = torch.tensor([0.6, 0.0, -0.6]).view(1, 3, 1, 1)
    return (x + light + tint + 0.3 * torch.randn(n, 3, size, size, generator=g)).sigmoid()


def normal(u: Tensor) -> Tensor:
    return (u - MEAN) / STD


def caffe(u: Tensor) -> Tensor:
    return (255 * (u - MEAN)).flip(1)


PREPARED: dict[str, Prepare] = {
    "0..1": lambda u: u,
    "0..255": lambda u: 255 * u,
    "-1..1": lambda u: 2 * u - 1,
    "normalised by ImageNet's mean and deviation": normal,
    "BGR, 0..255, less ImageNet's mean": caffe,
}
WRONGLY: dict[str, Prepare] = {
    "divided by 255 twice": lambda u: u / 255,
    "normalised twice by ImageNet's mean and deviation": lambda u: normal(normal(u)),
    "normalised without a division by 255": lambda u: normal(255 * u),
    "divided by 255 twice and normalised": lambda u: normal(u / 255),
}


def trained_on(prepare: Prepare) -> nn.Sequential:
    torch.manual_seed(0)
    return estimated(conv_net(), prepare(unit(256, seed=7)))


def only(net: nn.Module, given: object) -> Finding:
    report = check(net, given)
    assert set(found(report)) == {"SN106"}, found(report)
    return next(f for f in report.findings if f.code == "SN106")


@pytest.mark.parametrize("wanted", PREPARED)
@pytest.mark.parametrize("given", PREPARED)
def test_every_preparation_in_place_of_every_other(given: str, wanted: str) -> None:
    net, x = trained_on(PREPARED[wanted]), PREPARED[given](unit())
    if given == wanted:
        assert found(check(net, x)) == {}
        return
    finding = only(net, list(x.split(16)))
    assert finding.paths == ("1",)
    assert finding.message == f"the input is {given}; the first norm knows {wanted}"
    assert finding.fix is None


@pytest.mark.parametrize("given", WRONGLY)
def test_a_step_done_twice_or_left_out(given: str) -> None:
    wanted = "0..1" if given == "divided by 255 twice" else list(PREPARED)[3]
    finding = only(trained_on(PREPARED[wanted]), WRONGLY[given](unit()))
    assert finding.evidence["given"] == given
    assert finding.evidence["trained_on"] == wanted


@pytest.mark.parametrize("name", ["0..1", "0..255", "normalised by ImageNet's mean and deviation"])
def test_channels_in_reverse_order(name: str) -> None:
    net = trained_on(PREPARED[name])
    finding = only(net, PREPARED[name](unit().flip(1)))
    assert "reverse order" in finding.message
    assert finding.evidence["reversed"] is True


def test_reversed_and_not_normalised() -> None:
    finding = only(trained_on(normal), 255 * unit().flip(1))
    assert finding.evidence["reversed"] is True
    assert finding.evidence["given"] == "0..255"


def test_bytes_that_the_model_casts() -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = trained_on(PREPARED["0..1"])

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.float())

    finding = only(Cast(), (255 * unit()).to(torch.uint8))
    assert finding.message == "the input is 0..255; the first norm knows 0..1"


def test_it_explains_what_the_later_layers_show() -> None:
    net = trained_on(PREPARED["0..1"])
    net[4].running_mean.add_(2)
    finding = only(net, 255 * unit())
    assert "SN105 on 1, 4" in finding.explains


def test_batches_with_targets_and_a_forward_of_the_users() -> None:
    net = trained_on(PREPARED["0..1"])
    pairs = [(255 * x, torch.zeros(16)) for x in unit().split(16)]
    assert "0..255" in only(net, pairs).message
    named = [{"image": x, "id": "a"} for x, _ in pairs]
    report = check(net, named, forward=lambda model, batch: model(batch["image"]))
    assert found(report) == {"SN106": ("1",)}


def test_a_first_norm_that_is_frozen_is_a_remark() -> None:
    net = trained_on(PREPARED["0..1"])
    freeze(net, "1")
    finding = next(f for f in check(net, 255 * unit()).findings if f.code == "SN106")
    assert finding.severity == "info"


class TestTheModelStaysAsItWas:
    def test_bit_for_bit_with_its_hooks(self) -> None:
        net = trained_on(PREPARED["0..1"]).train()
        net[1].register_forward_pre_hook(lambda module, args: None)
        before = Fingerprint(net)
        given = 255 * unit()
        kept = given.clone()
        only(net, given)
        assert Fingerprint(net) == before
        assert torch.equal(given, kept)

    def test_where_the_forward_catches_what_it_can_and_raises_on_other_inputs(self) -> None:
        class Careful(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = trained_on(PREPARED["0..1"])

            def forward(self, x: Tensor) -> Tensor:
                if x.amin() < -1.5:
                    raise ValueError("no such image")
                try:
                    return self.net(x)
                except Exception:
                    return x

        net = Careful()
        before = Fingerprint(net)
        assert only(net, 255 * unit()).paths == ("net.1",)
        assert Fingerprint(net) == before

    def test_only_the_part_before_the_first_norm_runs_again(self) -> None:
        net = trained_on(PREPARED["0..1"])
        calls = {0: 0, 3: 0}
        for i in calls:
            net[i].register_forward_hook(lambda *_, i=i: calls.update({i: calls[i] + 1}))
        check(net, 255 * unit(), select="SN105")
        without = dict(calls)
        check(net, 255 * unit(), select="SN106")
        assert calls[3] == 2 * without[3]
        assert calls[0] > 2 * without[0]


class TestNearMisses:
    def codes(self, net: nn.Module, given: Tensor) -> set[str]:
        return set(found(check(net, list(given.split(16)))))

    @pytest.mark.parametrize("seed", range(5))
    def test_a_domain_of_another_contrast_and_colour(self, seed: int) -> None:
        net = trained_on(PREPARED["0..1"])
        g = torch.Generator().manual_seed(seed)
        tint = 0.5 * torch.rand(1, 3, 1, 1, generator=g)
        assert self.codes(net, 0.4 * unit() + tint) <= {"SN105"}

    def test_a_scale_that_is_none_of_these(self) -> None:
        assert self.codes(trained_on(PREPARED["0..1"]), 3 * unit()) == {"SN105"}

    def test_a_first_norm_that_is_stale_by_itself(self) -> None:
        net = trained_on(normal)
        net[1].running_mean.add_(2 * net[1].running_var.sqrt())
        assert self.codes(net, normal(unit())) == {"SN105"}
        net = trained_on(normal)
        net[1].running_var.mul_(9)
        assert self.codes(net, normal(unit())) == {"SN105"}

    def test_a_later_norm_that_is_stale(self) -> None:
        net = trained_on(normal)
        net[4].running_mean.add_(2 * net[4].running_var.sqrt())
        assert self.codes(net, normal(unit())) == {"SN105"}

    def test_one_channel_and_rows(self) -> None:
        net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        grey = unit(128)[:, :1]
        assert self.codes(estimated(net, grey), 255 * grey) == {"SN105"}
        rows = unit(128).flatten(1)[:, :16]
        mlp = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU())
        assert self.codes(estimated(mlp, rows), 255 * rows) == {"SN105"}

    def test_few_samples(self) -> None:
        assert self.codes(trained_on(PREPARED["0..1"]), 255 * unit(31)) == set()

    def test_no_statistics_first(self) -> None:
        net = trained_on(PREPARED["0..1"])
        net[1] = nn.InstanceNorm2d(8)
        assert self.codes(estimated(net, unit(128)), 255 * unit()) == set()

    @pytest.mark.parametrize("seed", range(6))
    def test_hardly_coloured_images_have_no_order_of_channels(self, seed: int) -> None:
        """In one order they fit a little better, by chance."""

        def grey(n: int, seed: int) -> Tensor:
            colour = unit(n, seed)
            return 0.98 * colour.mean(1, keepdim=True) + 0.02 * unit(n, 50 + seed)

        net = estimated(conv_net(), grey(128, 7 + seed))
        assert only(net, 255 * grey(64, seed)).evidence["reversed"] is False


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet10t"])
def test_a_real_architecture(name: str) -> None:
    model = make(name)
    estimated(model, normal(unit(64, 7, 32))).eval()
    both = ("SN105", "SN106")
    right = list(normal(unit(size=32)).split(32))
    assert found(check(model, right, select=both)) == {}
    report = check(model, list(unit(size=32).split(32)), select=both)
    assert found(report) == {"SN106": (report.layers[0].path,)}


def test_a_frozen_first_norm_of_torchvision_is_a_remark_too() -> None:
    net = trained_on(PREPARED["0..1"])
    frozen = torchvision.ops.FrozenBatchNorm2d(8)
    frozen.load_state_dict(net[1].state_dict())
    net[1] = frozen
    finding = next(f for f in check(net, 255 * unit()).findings if f.code == "SN106")
    assert finding.severity == "info"
