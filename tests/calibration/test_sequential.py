"""The fixed point of eval: each layer has the moments of what it receives in eval mode, now."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import stillnorm as sn
from calibration.received import assert_exact, recording
from stillnorm import recalibrate
from stillnorm.calibration import sequential
from stillnorm.errors import BatchError, CalibrationError
from stillnorm.tracing import Replay
from support.fingerprint import Fingerprint, values
from support.layers import conv_input, conv_net, settle
from support.zoo import CLASSIFIERS, images, make


def batches() -> list[Tensor]:
    return [conv_input(n, seed=n) for n in (5, 4, 2)]


def assert_fixed_point(net: nn.Module, data: list[Tensor]) -> None:
    with recording(net.eval()) as received, torch.no_grad():
        for x in data:
            net(x)
    assert_exact(received)


def settled(net: nn.Module, data: list[Tensor]) -> sn.calibration.RecalibrationReport:
    report = recalibrate(net, data, method="sequential")
    assert_fixed_point(net, data)
    return report


@pytest.fixture(params=["kept", "run again", "kept in part"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "run again":
        monkeypatch.setattr(sequential, "free_bytes", lambda device: 0)
    if request.param == "kept in part":
        monkeypatch.setattr(sequential, "free_bytes", lambda device: 60_000)


# ------------------------------------------------------------------ the fixed point


@pytest.mark.usefixtures("room")
def test_the_fixed_point() -> None:
    net = conv_net()
    report = settled(net, batches())
    assert [layer.path for layer in report.layers] == ["1", "3.1", "6"]
    assert [layer.count for layer in report.layers] == [396, 396, 11]
    assert (
        report.shared == report.circular == report.unreached == report.held == report.refused == ()
    )
    assert report.method == "sequential"


def test_kept_or_run_again_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, again = conv_net(), conv_net()
    recalibrate(kept, batches(), method="sequential")
    monkeypatch.setattr(sequential, "free_bytes", lambda device: 0)
    recalibrate(again, batches(), method="sequential")
    for a, b in zip(kept.buffers(), again.buffers(), strict=True):
        assert torch.equal(a, b)


def test_pooled_is_not_the_fixed_point() -> None:
    net = conv_net()
    recalibrate(net, batches())
    with pytest.raises(AssertionError):
        assert_fixed_point(net, batches())


@settings(max_examples=30)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_neither_split_nor_order_matters(sizes: list[int], random: Any) -> None:
    x = conv_input(sum(sizes) + 2).double()
    whole, parts = conv_net().double(), conv_net().double()
    recalibrate(whole, x, method="sequential")
    split = list(x.split([*sizes, 2]))
    random.shuffle(split)
    recalibrate(parts, iter(split), method="sequential")
    for name, buffer in whole.named_buffers():
        if "num_batches" not in name:
            other = parts.get_buffer(name)
            torch.testing.assert_close(other, buffer, rtol=1e-10, atol=1e-12)


def test_again_changes_nothing() -> None:
    net = conv_net()
    recalibrate(net, batches(), method="sequential")
    again = recalibrate(net, batches(), method="sequential")
    assert all(layer.mean_moved == 0 and layer.var_ratio == 1 for layer in again.layers)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions(dtype: torch.dtype) -> None:
    net = conv_net().to(dtype)
    settled(net, [x.to(dtype) for x in batches()])


def test_counts_grow_as_in_one_pass() -> None:
    net = conv_net()
    before = int(net[1].num_batches_tracked)
    recalibrate(net, batches(), method="sequential")
    assert int(net[1].num_batches_tracked) == before + 3


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_real_architectures(name: str) -> None:
    net = make(name)
    data = [images(n, seed=n) for n in (6, 3)]
    training = net.training
    before = Fingerprint(net, versions=False)
    report = settled(net, data)
    assert not report.unreached
    assert not report.shared
    report.undo()
    assert not Fingerprint(net.train(training), versions=False).differences(before)


# ------------------------------------------------------------------ how models compute


class Net(nn.Module):
    """Three norms, and a forward to be given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.BatchNorm2d(3) for _ in range(3))
        self.p, self.q = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)
        self.relu = nn.ReLU(inplace=True)
        self.how = forward
        self.stored: Any = None
        settle(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


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


# ------------------------------------------------------------------ what is left alone


def test_only_the_layers_named_and_the_rest_in_eval_mode() -> None:
    net = conv_net()
    before = values(net)
    report = recalibrate(net, batches(), "3", method="sequential")
    assert [layer.path for layer in report.layers] == ["3.1"]
    now = values(net)
    assert {n for n in now if now[n] != before[n]} == {
        f"3.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    }
    with recording(net.eval()) as received:
        for x in batches():
            net(x)
    assert_exact({net[3][1]: received[net[3][1]]})


def test_held_layers_keep_theirs() -> None:
    net = conv_net()
    sn.freeze(net, "1")
    held = net[1].running_mean.clone()
    report = recalibrate(net, batches(), method="sequential")
    assert report.held == ("1",)
    assert torch.equal(net[1].running_mean, held)
    with recording(net) as received:
        for x in batches():
            net.eval()(x)
    received.pop(net[1])
    assert_exact(received)


def test_layers_not_reached_keep_theirs() -> None:
    net = Net(lambda net, x: net.c(net.a(x)))
    var = net.b.running_var.clone()
    report = recalibrate(net, batches(), method="sequential")
    assert report.unreached == ("b",)
    assert torch.equal(net.b.running_var, var)


def test_other_kinds_of_norm() -> None:
    from support.zoo import torchvision

    net = nn.Sequential(
        nn.InstanceNorm2d(3, track_running_stats=True), nn.Conv2d(3, 3, 1),
        torchvision.ops.FrozenBatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, track_running_stats=False), nn.GroupNorm(1, 3),
    )  # fmt: skip
    report = recalibrate(net, batches(), "*", method="sequential")
    assert [layer.path for layer in report.layers] == ["0", "2", "4"]
    inputs = []
    with torch.no_grad():
        for module in (net[2], net[4]):
            module.register_forward_pre_hook(lambda m, args: inputs.append((m, args[0])))
        for x in batches():
            net.eval()(x)
    for layer in (net[2], net[4]):
        x = torch.cat([x for m, x in inputs if m is layer]).double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(layer.running_mean.double(), x.mean(1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), x.var(1), rtol=1e-5, atol=0)


def test_compiled_models() -> None:
    net = conv_net()
    recalibrate(torch.compile(net), batches(), method="sequential")
    assert_fixed_point(net, batches())


# ------------------------------------------------------------------ all or nothing


def unchanged(net: nn.Module, kind: type[BaseException], **options: Any) -> BaseException:
    before = Fingerprint(net)
    with pytest.raises(kind) as caught:
        recalibrate(net, options.pop("data", batches()), method="sequential", **options)
    assert not Fingerprint(net).differences(before)
    assert not torch.nn.modules.module._has_any_global_hook()
    return caught.value


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(2, 30, 3))
def test_an_error_at_any_call_of_the_forward(kind: type[BaseException], call: int) -> None:
    calls = 0

    def explode(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls >= call:
            raise kind("forward")

    net = conv_net().train()
    for module in net:
        module.register_forward_hook(explode)
    unchanged(net, BatchError if issubclass(kind, Exception) else kind)
    assert calls >= call


def test_nan_that_arises_once_statistics_are_final_names_the_batch() -> None:
    net = Net(lambda net, x: net.c(net.b(net.a(x)).sub(7.9).log() if not net.c.training else x))
    error = unchanged(net, CalibrationError)
    assert str(error).startswith("batch 0: c receives NaN")


def test_a_model_that_computes_something_else_each_time() -> None:
    net = Net(lambda net, x: net.c(net.b(net.a(x + torch.randn_like(x)))))
    error = unchanged(net, CalibrationError)
    assert "something else each time" in str(error)


def test_a_replay_that_goes_wrong_is_found_and_done_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known, whole = Replay._known, sequential._Stages.by_whole_forwards
    done: list[bool] = []

    def wrong(self: Replay, entry: Any) -> Any:
        result = known(self, entry)
        return 1.01 * result if isinstance(result, Tensor) else result

    def noted(self: Any, first: Any) -> Any:
        done.append(True)
        return whole(self, first)

    monkeypatch.setattr(Replay, "_known", wrong)
    monkeypatch.setattr(sequential._Stages, "by_whole_forwards", noted)
    net = conv_net()
    settled(net, batches())
    assert done
    monkeypatch.setattr(sequential, "_AGREES", math.inf)
    net = conv_net()
    recalibrate(net, batches(), method="sequential")
    with pytest.raises(AssertionError):
        assert_fixed_point(net, batches())


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
