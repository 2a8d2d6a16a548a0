"""A layer's share in the gap: exact against plain torch, and found by one backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, data, estimated
from stillnorm import recalibrate
from stillnorm.diagnosis.attribution import Attribution, attribute
from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.request import Request
from stillnorm.diagnosis.evidence.runs import run_flows
from stillnorm.norms import find_norms
from support.fingerprint import Fingerprint
from support.zoo import images, make


def attributed(net: nn.Module, data: object, exact: int | None = 3) -> Attribution | None:
    request = Request(net, data)
    return attribute(Evidence(request, run_flows(request, 8)), exact)


class Branches(nn.Module):
    """Two norms side by side, so that what each changes adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.BatchNorm1d(6), nn.BatchNorm1d(6)
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.left(x)) + self.b(self.right(x))


def branches() -> tuple[Branches, Tensor]:
    torch.manual_seed(0)
    net, x = Branches().double(), torch.randn(64, 6).double()
    net.left.running_mean.add_(0.5)
    net.right.running_var.mul_(3)
    return net, x


def test_where_nothing_follows_the_sweep_is_exact_and_the_shares_add_up() -> None:
    net, x = branches()
    first_order, exact = attributed(net, x, exact=0), attributed(net, x, exact=None)
    shares = {one.path: one.share for one in first_order.layers}
    assert not any(one.exact for one in first_order.layers)
    for one in exact.layers:
        assert one.exact
        assert shares[one.path] == pytest.approx(one.share, rel=1e-6)
    assert sum(shares.values()) == pytest.approx(1, rel=1e-6)


def test_a_share_is_what_plain_torch_shows_when_the_layer_is_left_out() -> None:
    net = estimated(conv_net())
    net[1].running_mean += 1
    net[4].running_var *= 2
    x = data(32)

    def output(by_batch: tuple[int, ...]) -> Tensor:
        other = copy.deepcopy(net).eval()
        for index in by_batch:
            other[index].train()
        with torch.no_grad():
            return other(x).double().flatten()

    by_batch, gap = output((1, 4)), output((1, 4)) - output(())
    expected = {
        path: float((by_batch - output(others)) @ gap / (gap @ gap))
        for path, others in (("1", (4,)), ("4", (1,)))
    }
    got = {one.path: one.share for one in attributed(net, x, exact=None).layers}
    assert got == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/lcnet_050", "transformers/resnet"])
@pytest.mark.parametrize("fault", ["mean", "variance"])
def test_the_layer_that_is_off_stands_first(name: str, fault: str) -> None:
    net = make(name)
    recalibrate(net, images(32, seed=9))
    layers = find_norms(net)
    victim = layers[len(layers) // 3]
    if fault == "mean":
        victim.module.running_mean += 2 * victim.module.running_var.sqrt()
    else:
        victim.module.running_var *= 4
    before = Fingerprint(net)
    seen = attributed(net, images(32, seed=9))
    assert seen.layers[0].path == victim.path
    assert seen.layers[0].exact
    assert sum(one.exact for one in seen.layers) == 3
    assert seen.recalibration > 0.9  # on the very batch
    assert Fingerprint(net) == before


def test_calls_of_a_shared_layer_count_together() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(x)) + self.head(self.norm(3 * x + 1))

    torch.manual_seed(0)
    first_order = attributed(Twice().double(), torch.randn(64, 6).double(), exact=0)
    assert [(one.path, one.share) for one in first_order.layers] == [
        ("norm", pytest.approx(1, rel=1e-6))
    ]


def test_without_a_gap_there_is_nothing_to_attribute() -> None:
    net, x = branches()
    recalibrate(net, x)
    for norm in (net.left, net.right):  # running variances are unbiased, those of a batch are not
        norm.running_var.mul_(63 / 64)
    assert attributed(net, x) is None


def test_outputs_of_other_shapes_cannot_be_compared() -> None:
    class Detects(nn.Module):
        """As many rows as are above zero."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return y[y[:, 0] > 0]

    assert attributed(Detects(), torch.randn(32, 6) + 1) is None


def test_where_the_model_stops_gradients_the_first_layers_are_run() -> None:
    class Stops(nn.Sequential):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    net = Stops(*estimated(conv_net()))
    net[1].running_mean += 1
    assert attributed(net, batches()).layers[0].path == "1"
