"""A file of Keras is read without running what is in it, and what is wrong with it is said."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
from keras import layers
from keras.src.saving.serialization_lib import SafeModeScope

import stillnorm as sn
from porting.twins import dense_net, same, values
from stillnorm.errors import FileFormatError


def with_layer(path: Path, layer: dict[str, Any]) -> Path:
    """Put one more layer into a file."""
    return rewritten(path, lambda config: config["config"]["layers"].insert(1, layer))


def rewritten(path: Path, change: Callable[[Any], object]) -> Path:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    change(config)
    members["config.json"] = json.dumps(config).encode()
    other = path.with_name("other.keras")
    with zipfile.ZipFile(other, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return other


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dense_net().save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


def test_a_model(saved: Path) -> None:
    model = sn.port.read_keras(saved)
    assert same(values(model), values(dense_net()))
    assert not model.compiled


def test_no_code_is_run_where_keras_would(tmp_path: Path) -> None:
    """`keras.config.enable_unsafe_deserialization()` is for the process; this file is not."""
    path = tmp_path / "model.keras"
    keras.Sequential([layers.Input((3,)), layers.Lambda(lambda x: x)]).save(path)
    with SafeModeScope(False), pytest.raises(FileFormatError, match="`Lambda` layer"):
        sn.port.read_keras(path)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (("mine", "Mine", {}), "Could not locate class 'Mine'"),
        (("os", "system", {"command": "true"}), "Could not locate class 'system'"),
        (("keras.utils", "get_file", {"fname": "a"}), "not a modeling function"),
    ],
)
def test_what_is_no_layer_of_keras(saved: Path, layer: tuple[str, str, Any], said: str) -> None:
    module, name, config = layer
    path = with_layer(
        saved, {"module": module, "class_name": name, "config": config, "registered_name": None}
    )
    with pytest.raises(FileFormatError, match=said):
        sn.port.read_keras(path)


def test_what_is_no_model(saved: Path) -> None:
    def optimizer(config: Any) -> None:
        config.clear()
        config.update(module="keras.optimizers", class_name="SGD", config={})

    with pytest.raises(FileFormatError, match="holds a SGD, no model"):
        sn.port.read_keras(rewritten(saved, optimizer))


def test_what_is_no_archive(saved: Path) -> None:
    for data in (saved.read_bytes()[:2000], b"\x89HDF\r\n\x1a\n" + bytes(500), b"hello"):
        saved.write_bytes(data)
        with pytest.raises(FileFormatError, match=r"model.keras cannot be loaded: File is"):
            sn.port.read_keras(saved)


def test_what_would_fill_the_memory(saved: Path) -> None:
    with zipfile.ZipFile(saved, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(20_000_000))
    with pytest.raises(FileFormatError, match="over 100 times its size"):
        sn.port.read_keras(saved)
