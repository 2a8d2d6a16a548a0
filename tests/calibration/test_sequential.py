"""The fixed point of eval: each layer has the moments of what it receives in eval mode, now."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import stillnorm as sn
from calibration.received import assert_exact, recording
from calibration.settling import Net, assert_fixed_point, batches, settled
from stillnorm import recalibrate
from stillnorm.calibration import sequential
from stillnorm.errors import BatchError, CalibrationError
from stillnorm.tracing import Replay
from support.fingerprint import Fingerprint, values
from support.layers import conv_input, conv_net
from support.zoo import CLASSIFIERS, images, make

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
