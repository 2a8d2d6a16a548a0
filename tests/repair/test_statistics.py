"""Repairs of single layers: exact, in place, undoable, and silent about layers that are fine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stillnorm import repair
from stillnorm.errors import RepairError
from stillnorm.repair import statistics, surgery
from support.fingerprint import Fingerprint
from support.interruptions import Interruption
from support.layers import conv_input, conv_net

REPAIRS: dict[str, Callable[[nn.Module], statistics.RepairReport]] = {
    "convert": lambda net: repair.convert_variance(net, "deviation"),
    "clamp": lambda net: repair.clamp_variance(net, minimum=50.0),
    "reset": repair.reset_statistics,
    "float32": lambda net: repair.to_float32(net.half()),
}


def variance(net: nn.Module) -> list[torch.Tensor]:
    return [m.running_var for m in net.modules() if isinstance(m, nn.BatchNorm2d)]


@settings(max_examples=40)
@given(
    st.sampled_from(["deviation", "inverse", "inverse deviation", 1.25]),
    st.floats(1e-3, 1e3),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_the_variance_is_what_it_was_made_of(held: Any, value: float, dtype: torch.dtype) -> None:
    layer = nn.BatchNorm2d(3, eps=1e-3).to(dtype)
    var = torch.full((3,), value, dtype=torch.float64)
    stored = {
        "deviation": var.sqrt(),
        "inverse": 1 / (var + 1e-3),
        "inverse deviation": (var + 1e-3).rsqrt(),
        1.25: var / 1.25,
    }[held]
    layer.running_var.copy_(stored)
    pointer = layer.running_var.data_ptr()
    report = repair.convert_variance(layer, held)
    rtol = 1e-3 if dtype == torch.float32 else 1e-9
    torch.testing.assert_close(layer.running_var.double(), var, rtol=rtol, atol=1e-6)
    assert layer.running_var.data_ptr() == pointer
    assert report.repaired[0][0] == ""


def test_what_gives_no_variance_is_refused_and_the_rest_is_done() -> None:
    net = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    net[0].running_var.copy_(torch.tensor([0.0, 1.0]))
    report = repair.convert_variance(net, "inverse")
    assert [path for path, _ in report.refused] == ["0"]
    assert [path for path, _ in report.repaired] == ["1"]
    assert net[0].running_var.tolist() == [0, 1]
    assert "no variance" in str(report)


@pytest.mark.parametrize("held", ["std", 0.0, -1.0, float("nan"), float("inf")])
def test_what_is_not_known_raises(held: Any) -> None:
    with pytest.raises(RepairError):
        repair.convert_variance(conv_net(), held)


def test_clamping_leaves_sound_layers_alone() -> None:
    net = conv_net()
    net[1].running_var[2] = -1e-3
    net[6].running_mean[0] = float("nan")
    before = [v.clone() for v in variance(net)]
    report = repair.clamp_variance(net)
    assert report.repaired == (("1", "running_var of 1 channel raised to 0"),)
    assert [path for path, _ in report.refused] == ["6"]
    assert net[1].running_var[2] == 0
    before[0][2] = 0
    assert all(map(torch.equal, variance(net), before))
    with pytest.raises(RepairError):
        repair.clamp_variance(net, minimum=-1.0)


def test_reset_is_a_new_layer() -> None:
    net = conv_net()
    repair.reset_statistics(net, "3")
    new = nn.BatchNorm2d(6).state_dict()
    state = net[3][1].state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(state[name], new[name])
    assert not torch.equal(net[1].running_mean, torch.zeros(4))


def test_a_half_layer_becomes_float32_as_a_whole() -> None:
    """Thread 001: half parameters beside float32 statistics do not go together."""
    net, x = conv_net().half(), conv_input().half()
    objects = [*net.parameters(), *net.buffers()]
    repair.to_float32(net, [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)])
    assert all(a is b for a, b in zip(objects, [*net.parameters(), *net.buffers()], strict=True))
    assert {t.dtype for t in net[1].state_dict().values()} == {torch.float32, torch.int64}
    assert net[0].weight.dtype == torch.float16
    assert net[:2].eval()(x).dtype == torch.float16


def test_inference_tensors_become_ordinary() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    x = conv_input()
    with pytest.raises(RuntimeError, match="nference"):
        net(x)
    values = [t.clone() for t in net.state_dict().values()]
    report = repair.clone_inference_tensors(net)
    assert len(report.repaired) == 2
    assert all(map(torch.equal, net.state_dict().values(), values))
    net(x).sum().backward()
    assert net[0].weight.grad is not None
    assert repair.clone_inference_tensors(net).repaired == ()


@pytest.mark.parametrize("name", REPAIRS)
def test_undo_is_exact(name: str) -> None:
    net = conv_net()
    before = Fingerprint(net.half() if name == "float32" else net, versions=False)
    report = REPAIRS[name](net)
    assert report.repaired
    assert Fingerprint(net, versions=False).differences(before)
    report.undo()
    assert not Fingerprint(net, versions=False).differences(before)
    assert report.to_json()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("name", REPAIRS)
def test_an_error_at_any_write_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, name: str, nth: int, kind: type[BaseException]
) -> None:
    edit = "set_data" if name == "float32" else "write"
    net = conv_net()
    before = Fingerprint(net.half() if name == "float32" else net, versions=False)
    interruption = Interruption(monkeypatch, surgery.Surgery, edit, nth, kind)
    with pytest.raises(kind):
        REPAIRS[name](net)
    monkeypatch.undo()
    assert interruption.calls == nth
    assert not Fingerprint(net, versions=False).differences(before)


def test_negative_variances_are_not_squared_away() -> None:
    for held in ("deviation", "inverse", "inverse deviation"):
        layer = nn.BatchNorm2d(2)
        layer.running_var.copy_(torch.tensor([-3.0, 2.0]))
        assert repair.convert_variance(layer, held).refused, held  # type: ignore[arg-type]
        assert layer.running_var.tolist() == [-3, 2]


def test_ties_stay_ties() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
        net[1].weight = net[0].weight
    repair.clone_inference_tensors(net)
    assert net[0].weight is net[1].weight
    half = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).half()
    half[1].bias = half[0].bias
    assert "shares a tensor" in repair.to_float32(half, "1").refused[0][1]
    assert half[0].bias.dtype == torch.float16


def test_gradients_are_cast_with_their_parameters() -> None:
    layer = nn.BatchNorm2d(3).half()
    layer.weight.grad = torch.ones(3).half()
    grad = layer.weight.grad
    report = repair.to_float32(layer)
    assert layer.weight.grad.dtype == torch.float32
    report.undo()
    assert layer.weight.grad is grad
