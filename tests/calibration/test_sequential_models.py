"""However a model computes: the fixed point of eval, or a layer that is pointed at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from calibration.received import assert_exact, recording
from calibration.settling import Net, assert_fixed_point, batches, settled
from stillnorm import recalibrate
from support.layers import conv_input, conv_net, settle

# ------------------------------------------------------------------ how models compute


def residual(net: Net, x: Tensor) -> Tensor:
    y = net.relu(net.a(net.p(x)))
    z = net.b(net.q(y))
    z += y
    y += net.c(z)  # writes to what was known before, with what was not
    return y


def branches(net: Net, x: Tensor) -> Tensor:
    y = net.p(x)
    return net.c(torch.cat((net.a(y), net.b(y.relu_())), 2))


def preallocated(net: Net, x: Tensor) -> Tensor:
    out = torch.zeros(x.shape[0], 3, 2 * x.shape[2], x.shape[3])
    out[:, :, : x.shape[2]] = net.a(x)
    out[:, :, x.shape[2] :] = net.q(x)
    return net.c(net.b(out[:, :, : x.shape[2]]) + out[:, :, x.shape[2] :])


def by_value(net: Net, x: Tensor) -> Tensor:
    y = net.a(net.p(x))
    y = net.b(y) if y.amax() > 2.5 else net.q(y)
    return net.c(y * float(y.mean()))


def either_order(net: Net, x: Tensor) -> Tensor:
    y = net.q(x)
    return net.c(net.a(y)) + net.b(net.p(y)) if len(x) % 2 else net.b(net.p(y)) + net.c(net.a(y))


def through_numpy(net: Net, x: Tensor) -> Tensor:
    y = torch.from_numpy(net.a(x).relu().numpy() + 1)
    return net.c(net.q(net.b(y)))


def stored(net: Net, x: Tensor) -> Tensor:
    net.stored = {"y": net.p(x), "z": net.a(x)}
    y = net.b(net.q(net.stored["z"]))
    return net.c(y + net.stored["y"]) + net.stored["z"]


def checkpointed(net: Net, x: Tensor) -> Tensor:
    y = checkpoint(lambda x: net.relu(net.a(net.p(x))), x, use_reentrant=False)
    return net.c(checkpoint(lambda y: net.b(net.q(y)), y, use_reentrant=True))


def views(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    left, right = y.chunk(2, dim=3)
    left.mul_(2)
    right.copy_(net.q(right))
    return net.c(net.b(y))


def writes_to_its_input(net: Net, x: Tensor) -> Tensor:
    x.sub_(1).div_(2)
    y = net.b(net.q(net.a(x)))
    return net.c(y + x)


def metadata(net: Net, x: Tensor) -> Tensor:
    y = net.a(x)
    n, c, h, w = y.shape
    y = y.view(n, c, h * w).transpose(1, 2).contiguous().view(n, h, w, c).permute(0, 3, 1, 2)
    if y.is_contiguous() or y.dim() != 4 or y.stride(1) != 1:
        raise AssertionError("what can be read without values is right")
    return net.c(net.b(net.q(y)))


HOWS = [residual, branches, preallocated, by_value, either_order, through_numpy, stored,
        checkpointed, views, writes_to_its_input, metadata]  # fmt: skip


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("how", HOWS, ids=lambda how: how.__name__)
def test_however_the_model_computes(how: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(how)
    data = [torch.randn(n, 3, 4, 4) + n for n in (7, 4, 6, 5)]
    given = [x.clone() for x in data]
    report = recalibrate(net, data, method="sequential")
    assert report.shared == ()
    assert all(torch.equal(a, b) for a, b in zip(data, given, strict=True))
    assert_fixed_point(net, data)


def test_features_kept_by_hooks_are_those_of_the_same_batch() -> None:
    """fastai's U-Net: the decoder takes what hooks on the encoder have stored."""
    net = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    found: dict[str, Tensor] = {}
    net[0].register_forward_hook(lambda m, args, y: found.update(y=y))
    net[1].register_forward_hook(lambda m, args, y: y + found["y"])
    settled(net, batches())


def test_one_head_on_several_maps_is_pooled_over_them() -> None:
    """RetinaNet's heads: each norm once for each level, none after itself."""

    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(
                nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(),
                nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3),
            )  # fmt: skip

        def forward(self, x: Tensor) -> list[Tensor]:
            return [self.head(level) for level in (x, F.avg_pool2d(x, 2), 3 * x)]

    net = Levels()
    report = settled(net, batches())
    assert report.shared == ("head.1", "head.4")


class Again(nn.Module):
    """A norm that is given what comes of its own output, and others before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = (nn.BatchNorm2d(3) for _ in range(3))
        self.conv = nn.Conv2d(3, 3, 1)
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.conv(self.first(x)))
        return self.last(self.twice(4 * x.relu() + 3))


def test_a_layer_after_itself_has_no_fixed_point_and_is_pointed_at() -> None:
    net, data = Again(), batches()
    report = recalibrate(net, data, method="sequential")
    assert report.shared == report.circular == ("twice",)
    assert len(report.layers) == 3
    with recording(net.eval()) as received, torch.no_grad():
        for x in data:
            net(x)
    received.pop(net.twice)
    assert_exact(received)
    assert "no fixed point: twice" in str(report)


def test_layers_that_depend_on_each_other_are_pointed_at() -> None:
    net = Net(lambda net, x: net.c(net.b(net.a(x)) if len(x) % 2 else net.a(net.b(x))))
    data = batches()
    report = recalibrate(net, data, method="sequential")
    assert report.circular == ("a",)
    assert report.shared == ()
    with recording(net.eval()) as received:
        for x in data:
            net(x)
    received.pop(net.a)
    assert_exact(received)


# ------------------------------------------------------------------ models that make it hard


def early_exit(net: Net, x: Tensor) -> Tensor:
    y = net.a(net.p(x))
    return net.c(y) if y.square().mean() < 1.0 or len(x) == 6 else net.c(net.b(net.q(y)))


def a_loop_by_value(net: Net, x: Tensor) -> Tensor:
    y = net.a(net.p(x))
    for _ in range(1 + int(y.amax() > 2.9)):
        y = net.relu(net.q(y))
    return net.c(net.b(y))


def residual_across(net: Net, x: Tensor) -> Tensor:
    """The norm takes a view of what is added again afterwards."""
    y = net.p(x)
    y = y + net.q(net.a(y.transpose(2, 3)).transpose(2, 3))
    return net.c(net.b(y.transpose(2, 3)))


def asserted(net: Net, x: Tensor) -> Tensor:
    y = net.p(x)
    z = net.a(net.q(x))
    assert torch.isfinite(z).all()
    return net.c(net.b(net.q(z) + y))


def by_keyword(net: Net, x: Tensor) -> Tensor:
    return net.c(input=net.b(input=net.q(net.a(input=net.p(x)))))


def sparse(net: Net, x: Tensor) -> Tensor:
    mixed = torch.sparse.mm(torch.eye(4).to_sparse(), net.a(x).transpose(0, 2).flatten(1))
    return net.c(net.b(mixed.view(4, 3, len(x), 4).transpose(0, 2)))


def vmapped(net: Net, x: Tensor) -> Tensor:
    return net.c(net.b(torch.vmap(lambda row: row * 2)(net.a(net.p(x)))))


def selected(net: Net, x: Tensor) -> Tensor:
    y = net.a(net.p(x))
    chosen = y[y[:, 0, 0, 0] > y[:, 0, 0, 0].mean()]
    return net.c(net.b(net.q(chosen)) + torch.arange(len(chosen)).view(-1, 1, 1, 1) * 0.1)


def unpacked(net: Net, x: Tensor) -> Tensor:
    left, right, *_ = net.p(torch.stack((x, 2 * x)).flatten(0, 1)).view(2, len(x), 3, 4, 4)
    return net.c(net.b(net.a(left) + right))


def an_array_written(net: Net, x: Tensor) -> Tensor:
    array = net.p(x).numpy()
    array *= 2
    return net.c(net.b(net.a(x) + torch.from_numpy(array)))


def scratch(net: Net, x: Tensor) -> Tensor:
    if net.stored is None:
        net.stored = torch.empty(16, 3, 4, 4)
    part = net.stored[: len(x)]
    part.copy_(x * 2)
    return net.c(net.b(net.q(net.a(net.p(x))) + part))


def appended(net: Net, x: Tensor) -> Tensor:
    net.stored = net.stored or []
    for layer in (net.a, net.b):
        net.stored.append(x)
        x = layer(net.q(x))
    total = x + sum(net.stored)
    net.stored.clear()
    return net.c(total)


def busy(net: Net, x: Tensor) -> Tensor:
    if net.stored:
        raise RuntimeError("is running")
    net.stored = True
    x = net.c(net.b(net.a(x)))
    net.stored = None
    return x


def past_the_counter(net: Net, x: Tensor) -> Tensor:
    y = net.p(x)
    z = net.q(net.a(x) + y)
    y.data.mul_(2)
    return net.c(net.b(z) + y)


def as_parameter(net: Net, x: Tensor) -> Tensor:
    y = nn.Parameter(net.p(x) * 2)
    return net.c(net.b(net.a(x)) + y).detach()


def with_gradients(net: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = net.b(net.q(torch.tanh(net.a(net.p(x))))).square().sum()
        (force,) = torch.autograd.grad(energy, x)
    return net.c(force.detach())


def its_own_statistics(net: Net, x: Tensor) -> Tensor:
    y = net.a(net.p(x))
    return net.c(net.b(y * (net.a.running_var + 1e-5).rsqrt().view(1, 3, 1, 1)))


HARD = [early_exit, a_loop_by_value, residual_across, asserted, by_keyword, sparse, vmapped,
        selected, unpacked, an_array_written, scratch, appended, busy, past_the_counter,
        as_parameter, with_gradients, its_own_statistics]  # fmt: skip


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("how", HARD, ids=lambda how: how.__name__)
def test_models_that_make_it_hard(how: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(how)
    data = [torch.randn(n, 3, 4, 4) + n for n in (7, 4, 6, 5)]
    report = recalibrate(net, data, method="sequential")
    assert report.circular == ()
    net.stored = None
    assert_fixed_point(net, data)


def test_layers_that_only_eval_reaches_are_found() -> None:
    class Exit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x if x.square().mean() < 1.5 else self.b(x)

    torch.manual_seed(0)
    net, data = Exit(), [torch.randn(8, 4), 10 * torch.randn(8, 4), torch.randn(7, 4)]
    report = settled(net, data)
    assert [layer.path for layer in report.layers] == ["a", "b"]


def test_scripted_parts() -> None:
    block = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    settled(nn.Sequential(nn.BatchNorm2d(3), block, nn.BatchNorm2d(3), block), batches())


def test_a_loader_that_fills_one_tensor_again_and_again() -> None:
    memory = torch.empty(4, 3, 6, 6)
    data = [conv_input(4, seed=seed) for seed in range(3)]

    def loader() -> Any:
        for x in data:
            yield memory.copy_(x)

    net = conv_net()
    recalibrate(net, loader(), method="sequential")
    assert_fixed_point(net, data)


def test_batches_that_the_forward_takes_apart() -> None:
    net, data = conv_net(), [{"x": x} for x in batches()]
    given = [dict(batch) for batch in data]
    recalibrate(net, iter(given), forward=lambda m, b: m(b.pop("x")), method="sequential")
    assert_fixed_point(net, batches())
