"""SN403: fires where a mean uses up the precision of the input's type."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check
from support.zoo import images, make


def offset(ratio: float, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)).to(dtype)
    x = torch.randn(256, 4)
    x[:, 2] += ratio
    return net, [x.to(dtype)]


def silent(net: nn.Module, given: object, **options: object) -> None:
    report = check(net, given, select="SN403", **options)
    assert (report.findings, report.crashed) == ((), ())


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float32, 3e3), (torch.float16, 1e3), (torch.bfloat16, 1e2)],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_over_the_limit_of_the_type_and_not_under_it(
    dtype: torch.dtype, limit: float, sign: int
) -> None:
    report = check(*offset(sign * 1.5 * limit, dtype), select="SN403")
    assert found(report) == {"SN403": ("0",)}
    assert report.findings[0].evidence["channels"] == {"0": 1}
    assert report.findings[0].evidence["ratio"]["0"] == pytest.approx(1.5 * limit, rel=0.15)
    silent(*offset(sign * 0.5 * limit, dtype))


def test_torch_loses_the_variance_there() -> None:
    """Many values in one channel: how many it takes depends on the kernel and its threads."""
    torch.manual_seed(0)
    given = 1e5 + torch.randn(65536, 4)
    layer = nn.BatchNorm1d(4, momentum=1.0)
    layer(given)
    assert (layer.running_var / given.double().var(0) > 1.5).any()
    assert found(check(nn.Sequential(layer), [given], select="SN403")) == {"SN403": ("0",)}


def test_half_precision_rounds_the_deviation_away_before() -> None:
    x = torch.randn(1000).double()
    for dtype, limit in ((torch.float16, 1e3), (torch.bfloat16, 1e2)):
        error = ((x + limit).to(dtype).double() - limit - x).std()
        assert 0.1 < error < 0.2


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_inside_the_network(kind: type[nn.Module]) -> None:
    net = estimated(conv_net())
    net[4] = kind(8)
    with torch.no_grad():
        net[3].bias[0] = 1e5
    assert found(check(net, batches(), select="SN403")) == {"SN403": ("4",)}


def test_instance_norm_is_judged_by_the_sample() -> None:
    """Offsets of either sign, which only differ between samples, are spread to batch norm."""
    x = data(64)
    x[::2] += 1e5
    x[1::2] -= 1e5
    assert found(check(nn.Sequential(nn.InstanceNorm2d(3)), [x], select="SN403")) == {
        "SN403": ("0",)
    }
    silent(nn.Sequential(nn.BatchNorm2d(3)), [x])


class TestNearMisses:
    def test_a_healthy_network(self) -> None:
        silent(estimated(conv_net()), batches())

    def test_a_constant_channel_of_any_size(self) -> None:
        net, (x,) = offset(0)
        x[:, 2] = 1e6
        silent(net, [x])

    def test_a_dead_channel_with_its_convolutions_bias(self) -> None:
        net = conv_net()
        with torch.no_grad():
            net[3].weight[0] = 0
            net[3].bias[0] = 3.0
        silent(net, batches())
        silent(net.bfloat16(), [x.bfloat16() for x in batches()])

    def test_images_from_0_to_255_in_half_precision(self) -> None:
        net = nn.Sequential(nn.BatchNorm2d(3)).bfloat16()
        silent(net, [(120 + 60 * data(64)).bfloat16()])

    def test_float64(self) -> None:
        silent(*offset(1e6, torch.float64))

    def test_one_sample_and_none(self) -> None:
        net = nn.Sequential(nn.BatchNorm1d(4)).eval()
        silent(net, [torch.full((1, 4), 1e9)])
        silent(net, [torch.zeros(0, 4)])

    def test_values_that_are_not_finite(self) -> None:
        net, (x,) = offset(1e6)
        x[0, 2] = torch.nan
        silent(net, [x])


def test_in_a_real_network_at_its_own_layer() -> None:
    model, given = make("timm/resnet10t"), [images(16, seed=3, size=32)]
    silent(model, given)
    model.layer3[0].conv2.bias = nn.Parameter(torch.full((256,), 1e5))
    report = check(model, given, select="SN403")
    assert found(report) == {"SN403": ("layer3.0.bn2",)}
