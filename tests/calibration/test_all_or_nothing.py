"""Whatever raises, wherever: every layer has new statistics, or no layer has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillnorm import recalibrate
from stillnorm.calibration import change, commit, pool, report
from stillnorm.errors import BatchError, CalibrationError, StateError
from support.fingerprint import Fingerprint
from support.layers import conv_input, conv_net

KINDS = [ValueError, KeyboardInterrupt, MemoryError, GeneratorExit]


def batches() -> list[Tensor]:
    return [conv_input(n, seed=n) for n in (5, 4, 2)]


def unchanged(run: Callable[[nn.Module], object], kind: type[BaseException]) -> BaseException:
    """Assert that `run` raises `kind` and that the model is then as before, to the last bit."""
    net = conv_net().train()
    net[1].momentum = None
    before = Fingerprint(net)
    with pytest.raises(kind) as caught:
        run(net)
    assert not Fingerprint(net).differences(before)
    assert not torch.nn.modules.module._has_any_global_hook()
    assert torch.is_grad_enabled()
    return caught.value


# ------------------------------------------------------------------ the data


def test_no_batch() -> None:
    error = unchanged(lambda net: recalibrate(net, []), CalibrationError)
    assert "no batch" in str(error)


def test_an_iterator_that_has_been_read() -> None:
    used = iter(batches())
    list(used)
    error = unchanged(lambda net: recalibrate(net, used), CalibrationError)
    assert "only once" in str(error)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_values_that_are_not_finite_name_batch_and_layer(bad: float) -> None:
    x = batches()
    x[1][0, 0, 0, 0] = bad
    error = unchanged(lambda net: recalibrate(net, x), CalibrationError)
    assert str(error).startswith("batch 1: 1 receives NaN, infinity or values too large")


def test_nan_that_arises_in_the_model_names_the_first_layer_to_receive_it() -> None:
    def run(net: nn.Module) -> None:
        net[3][0].bias = nn.Parameter(torch.full((6,), float("nan")))
        nonlocal before
        before = Fingerprint(net)
        recalibrate(net, batches())

    net, before = conv_net(), None
    with pytest.raises(CalibrationError, match=r"batch 0: 3\.1 receives .* in 6 of 6 channels"):
        run(net)
    assert not Fingerprint(net).differences(before)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("after", range(4))
def test_a_loader_that_raises(kind: type[BaseException], after: int) -> None:
    def loader() -> Iterator[Tensor]:
        yield from batches()[:after]
        raise kind("loader")

    expected = BatchError if issubclass(kind, Exception) else kind
    error = unchanged(lambda net: recalibrate(net, loader()), expected)
    if expected is BatchError:
        assert f"reading batch {after}" in str(error)


def test_a_batch_that_does_not_fit() -> None:
    x = iter([conv_input(), conv_input().repeat(1, 2, 1, 1)])
    error = unchanged(lambda net: recalibrate(net, x), BatchError)
    assert str(error).startswith("batch 1: the forward raised RuntimeError")


# ------------------------------------------------------------------ the forward


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("module", range(10))
def test_a_forward_that_raises_in_any_module(kind: type[BaseException], module: int) -> None:
    calls = 0

    def explode(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise kind("forward")

    net = conv_net().train()
    list(net.modules())[module].register_forward_hook(explode)
    before = Fingerprint(net)
    with pytest.raises(BatchError if issubclass(kind, Exception) else kind):
        recalibrate(net, batches())
    assert calls == 2
    assert not Fingerprint(net).differences(before)


# ------------------------------------------------------------------ the commit


def test_statistics_that_the_dtype_cannot_hold() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)).half()
    with torch.no_grad():
        net[0].weight.fill_(2000)
    x = torch.randn(64, 2).half()
    before = Fingerprint(net)
    with pytest.raises(CalibrationError, match=r"1: its running_var .* does not fit float16"):
        recalibrate(net, x)
    assert not Fingerprint(net).differences(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", range(9))
def test_an_interruption_at_every_single_write(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], step: int
) -> None:
    real, writes = commit.write, 0

    def write(tensor: Tensor, value: Tensor) -> None:
        nonlocal writes
        writes += 1
        real(tensor, value)
        if writes == step + 1:
            raise kind("write")

    monkeypatch.setattr(commit, "write", write)
    net = conv_net().train()
    before = Fingerprint(net, versions=False)
    with pytest.raises(kind):
        recalibrate(net, batches())
    assert not Fingerprint(net, versions=False).differences(before)
    assert writes == step + 1 + 9, "three layers of three buffers, all put back"


@pytest.mark.parametrize(
    ("where", "name"),
    [
        (pool, "read"),
        (pool, "pool"),
        (change, "mean_moved"),
        (change, "var_ratio"),
        (commit, "same_bits"),
        (report.Recalibrated, "__init__"),
        (report.RecalibrationReport, "__init__"),
    ],
    ids=lambda part: getattr(part, "__name__", part),
)
def test_an_interruption_anywhere_else(
    monkeypatch: pytest.MonkeyPatch, where: object, name: str
) -> None:
    def explode(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, name, explode)
    net = conv_net().train()
    before = Fingerprint(net, versions=False)
    with pytest.raises(KeyboardInterrupt):
        recalibrate(net, batches())
    assert not Fingerprint(net, versions=False).differences(before)


def test_a_buffer_that_does_not_take_its_value() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    net[1].running_mean = torch.zeros(8)[::2]
    net[1].running_var = net[1].running_mean  # one memory, two values
    x = torch.randn(8, 4)
    before = Fingerprint(net, versions=False)
    with pytest.raises(StateError, match="did not take the value"):
        recalibrate(net, x)
    assert not Fingerprint(net, versions=False).differences(before)


def test_undo_is_all_or_nothing_too(monkeypatch: pytest.MonkeyPatch) -> None:
    net = conv_net()
    done = recalibrate(net, batches())
    before = Fingerprint(net, versions=False)
    real, writes = commit.write, 0

    def write(tensor: Tensor, value: Tensor) -> None:
        nonlocal writes
        writes += 1
        real(tensor, value)
        if writes == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(commit, "write", write)
    with pytest.raises(KeyboardInterrupt):
        done.undo()
    assert not Fingerprint(net, versions=False).differences(before)
