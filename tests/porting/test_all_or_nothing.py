"""Whatever raises, wherever: both models are as they were. And `undo` is the way back."""

from __future__ import annotations

import signal
from typing import Any

import keras
import pytest
import torch
from torch import nn

import stillnorm as sn
from porting.twins import dense_net, dense_twin, filled, image_net, image_twin, same, values
from stillnorm import repair
from stillnorm.errors import PortError
from stillnorm.porting import agreement
from stillnorm.porting.keras import parts, running
from support.fingerprint import Fingerprint
from support.interruptions import Interruption


def settings(model: Any) -> list[object]:
    """What a Keras model is besides its values."""
    norms = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization)]
    dropouts = [x for x in model.layers if isinstance(x, keras.layers.Dropout)]
    switches = [weight.trainable for weight in model.weights]
    of_norms = [(x.epsilon, x.momentum, x.trainable) for x in norms]
    return [switches, of_norms, [x.rate for x in dropouts]]


def held_twin() -> nn.Sequential:
    twin = image_twin()
    sn.port.from_keras(image_net(), twin)
    sn.freeze(twin, ["1", "6"])
    return twin


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("where", "name", "nth"),
    [
        (repair.surgery, "write", 1),
        (repair.surgery, "write", 7),
        (repair.surgery.Surgery, "set_item", 3),
        (nn.Module, "__call__", 5),
        (running, "run", 1),
        (running, "run", 2),
    ],
)
def test_from_keras(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, nth: int, kind: type[BaseException]
) -> None:
    there, here, x = image_net(), image_twin(), torch.randn(4, 9, 7, 3)
    there.layers[1].trainable = False
    before, kept, switches = Fingerprint(here, versions=False), values(there), settings(there)
    target = agreement if where is running else where
    interruption = Interruption(monkeypatch, target, name, nth, kind)
    with pytest.raises((kind, PortError), match="step"):
        sn.port.from_keras(there, here, example=x, count=100)
    monkeypatch.undo()
    assert interruption.calls >= nth
    assert before.differences(Fingerprint(here, versions=False)) == []
    assert same(values(there), kept)
    assert settings(there) == switches


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("where", "name", "nth"), [(parts, "assign", 1), (parts, "assign", 9), (agreement, "run", 2)]
)
def test_to_keras(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, nth: int, kind: type[BaseException]
) -> None:
    here, there, x = held_twin(), filled(image_net(), seed=3), torch.randn(4, 9, 7, 3)
    before, kept, switches = Fingerprint(here, versions=False), values(there), settings(there)
    interruption = Interruption(monkeypatch, where, name, nth, kind)
    with pytest.raises((kind, PortError), match="step"):
        sn.port.to_keras(here, there, example=x)
    monkeypatch.undo()
    assert interruption.calls >= nth
    assert before.differences(Fingerprint(here, versions=False)) == []
    assert same(values(there), kept)
    assert settings(there) == switches


def test_undo_from_keras() -> None:
    there, here = image_net(), held_twin()
    before = Fingerprint(here, versions=False)
    report = sn.port.from_keras(filled(there, seed=4), here, count=99)
    assert before != Fingerprint(here, versions=False)
    assert not sn.is_frozen(here, "1")
    report.undo()
    assert before.differences(Fingerprint(here, versions=False)) == []
    report.undo()  # once is enough
    assert before.differences(Fingerprint(here, versions=False)) == []


def test_undo_to_keras() -> None:
    here, there = held_twin(), filled(image_net(), seed=4)
    kept, switches = values(there), settings(there)
    report = sn.port.to_keras(here, there, count=99)
    assert not same(values(there), kept)
    assert settings(there) != switches
    report.undo()
    assert same(values(there), kept)
    assert settings(there) == switches


def test_comparing_leaves_no_trace() -> None:
    there, here, x = dense_net(), dense_twin(), torch.randn(16, 6)
    here.train()
    here[2].eval()
    before, kept, switches = Fingerprint(here), values(there), settings(there)
    state = [parts.read(variable) for variable in there.variables]
    agreed = sn.port.compare(there, here, x)
    assert not agreed
    assert before.differences(Fingerprint(here)) == []
    assert same(values(there), kept)
    assert same([parts.read(variable) for variable in there.variables], state)
    assert settings(there) == switches


def test_the_sign_of_a_zero_comes_back() -> None:
    there, here = dense_net(), dense_twin()
    there.layers[1].momentum = 1.0  # keeps the zeros from which a comparison starts
    variable = there.layers[1].moving_mean
    variable.assign(torch.full((10,), -0.0).numpy())
    sn.port.compare(there, here, torch.randn(16, 6))
    assert torch.signbit(parts.read(variable)).all()


def test_ctrl_c_on_the_way_back_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    there, x = image_net(), torch.randn(4, 9, 7, 3)
    kept, switches = values(there), settings(there)
    real = running.assign

    def assign(variable: Any, value: torch.Tensor) -> None:
        signal.raise_signal(signal.SIGINT)
        real(variable, value)

    monkeypatch.setattr(running, "assign", assign)
    with pytest.raises(KeyboardInterrupt), running.left_as_found(there):
        running.run(there, x, training=True)
    assert same(values(there), kept)
    assert settings(there) == switches


def test_memory_is_not_shared() -> None:
    there, here = dense_net(), dense_twin()
    sn.port.from_keras(there, here)
    kept = values(there)
    with torch.no_grad():
        for tensor in (*here.parameters(), *here.buffers()):
            tensor.add_(1)
    assert same(values(there), kept)
    sn.port.to_keras(here, there)
    kept = values(there)
    with torch.no_grad():
        for tensor in (*here.parameters(), *here.buffers()):
            tensor.add_(1)
    assert same(values(there), kept)
