"""Exported programs are read without unpickling: the norms, their tensors, what they use."""

from __future__ import annotations

import io
import json
import os
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import stillnorm as sn
from stillnorm.diagnosis.files.checkpoint import read_target
from stillnorm.errors import FileFormatError
from stillnorm.norms import find_norms
from support.fingerprint import bits


class Net(nn.Module):
    """Every way to call a batch norm that is or is not one: stds is weight standardisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3)
        self.low = nn.BatchNorm2d(4).half()
        self.inside = nn.Sequential(nn.InstanceNorm2d(4, affine=True, track_running_stats=True))
        self.untracked = nn.BatchNorm2d(4, track_running_stats=False)
        self.plain = nn.InstanceNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.conv.weight
        stds = F.batch_norm(weight.reshape(1, 4, -1), None, None, training=True)
        x = F.conv2d(x, stds.reshape_as(weight))
        x = self.inside(self.low(self.bn(x).half()).float())
        return self.plain(self.untracked(x))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    made(torch.randn(4, 3, 8, 8))
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, net: Net) -> Path:
    """train.pt2, eval.pt2, and both in core operations."""
    folder = tmp_path_factory.mktemp("exported")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mode in ("train", "eval"):
            program = torch.export.export(net.train(mode == "train"), (torch.ones(2, 3, 8, 8),))
            torch.export.save(program, folder / f"{mode}.pt2")
            torch.export.save(program.run_decompositions(), folder / f"{mode}_core.pt2")
    return folder


def named(path: Path) -> dict[str, Any]:
    return {norm.path: norm.uses for norm in read_target(path).norms}


EVAL = {"bn": "running", "low": "running", "inside.0": "running", "untracked": "batch"}
TRAIN = {"bn": "batch", "low": "batch", "inside.0": "sample", "untracked": "batch"}


@pytest.mark.parametrize("core", ["", "_core"])
@pytest.mark.parametrize(("mode", "expected"), [("eval", EVAL), ("train", TRAIN)])
def test_what_each_norm_uses(folder: Path, mode: str, core: str, expected: dict[str, str]) -> None:
    assert named(folder / f"{mode}{core}.pt2") == expected


@pytest.mark.parametrize("file", ["train.pt2", "train_core.pt2", "eval.pt2", "eval_core.pt2"])
def test_what_keeps_no_statistics_and_mixes_nothing_is_no_norm_layer(
    folder: Path, file: str
) -> None:
    norms = read_target(folder / file).norms
    assert {n.path for n in norms} == {"bn", "low", "inside.0", "untracked"}
    assert {n.path for n in norms if n.uses == "batch"} <= {"bn", "low", "untracked"}


def test_tensors_and_settings_are_those_of_the_model(folder: Path, net: Net) -> None:
    stored = {x.path: x for x in find_norms(read_target(folder / "eval.pt2").tree())}
    for layer in find_norms(net)[:4]:
        twin = stored[layer.path]
        assert twin.eps == layer.eps
        own = {k: bits(t) for k, t in layer.tensors().items() if k != "num_batches_tracked"}
        assert {k: bits(t) for k, t in twin.tensors().items()} == own


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path: Path, content: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def edited(source: Path, path: Path, end: str, edit: Callable[[Any], Any]) -> Path:
    """Copy an archive with one of its JSON files changed."""
    content = members(source)
    (name,) = (name for name in content if name.endswith(end))
    content[name] = json.dumps(edit(json.loads(content[name]))).encode()
    return write(path, content)


@pytest.mark.parametrize("form", ["2.6", "2.8"])
def test_older_archives(folder: Path, tmp_path: Path, net: Net, form: str) -> None:
    content = members(folder / "train.pt2")
    (program,) = (data for name, data in content.items() if name.endswith("models/model.json"))
    state = io.BytesIO()
    torch.save(net.state_dict(), state)
    if form == "2.6":
        names = ("serialized_exported_program.json", "serialized_state_dict.pt")
    else:
        names = ("root/models/model.json", "root/data/weights/model.pt")
    path = write(tmp_path / "a.pt2", dict(zip(names, (program, state.getvalue()), strict=True)))
    assert named(path) == TRAIN
    stored = {norm.path: norm.tensors for norm in read_target(path).norms}
    assert torch.equal(stored["bn"]["running_var"], net.bn.running_var)


class Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.marker}",))


def test_nothing_is_unpickled(folder: Path, tmp_path: Path) -> None:
    evil = io.BytesIO()
    torch.save(Evil(tmp_path / "pwned"), evil)

    def pickled(config: Any) -> Any:
        for entry in config["config"].values():
            entry["use_pickle"] = True
        return config

    path = edited(folder / "train.pt2", tmp_path / "a.pt2", "_weights_config.json", pickled)
    content = members(path)
    for name in content:
        if "/weights/weight_" in name or "sample_inputs" in name:
            content[name] = evil.getvalue()
    assert named(write(path, content)) == TRAIN
    old = {"serialized_exported_program.json": b"{}", "serialized_state_dict.pt": evil.getvalue()}
    old["serialized_exported_program.json"] = next(
        data for name, data in content.items() if name.endswith("models/model.json")
    )
    with pytest.raises(FileFormatError, match="holds more than tensors"):
        read_target(write(tmp_path / "b.pt2", old))
    assert not (tmp_path / "pwned").exists()


def test_a_later_version_says_so(folder: Path, tmp_path: Path) -> None:
    def later(program: Any) -> Any:
        return program | {"schema_version": {"major": 99, "minor": 1}}

    path = edited(folder / "eval.pt2", tmp_path / "a.pt2", "models/model.json", later)
    with pytest.raises(FileFormatError, match="has version 99 of the format") as caught:
        read_target(path)
    assert caught.value.help == "update stillnorm"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda program: [],
        lambda program: program | {"graph_module": {}},
        lambda program: program | {"schema_version": 3},
        lambda program: {"torch_version": "1.0"},
        lambda program: None,
    ],
)
def test_an_unknown_form_says_so(folder: Path, tmp_path: Path, break_it: Any) -> None:
    path = edited(folder / "eval.pt2", tmp_path / "a.pt2", "models/model.json", break_it)
    with pytest.raises(FileFormatError, match="of a version that cannot be read"):
        read_target(path)


def test_weights_that_are_cut_short(folder: Path, tmp_path: Path) -> None:
    content = members(folder / "eval.pt2")
    cut = {n: data[:3] if "/weights/weight_" in n else data for n, data in content.items()}
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_target(write(tmp_path / "a.pt2", cut))


def test_compiled_packages_have_no_graph(tmp_path: Path) -> None:
    path = write(tmp_path / "a.pt2", {"a/data/aotinductor/model/x.so": b"", "a/version": b"1"})
    with pytest.raises(FileFormatError, match="holds no graph"):
        read_target(path)


def test_a_file_cut_short(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "eval.pt2").read_bytes()
    for part in range(1, 10):
        (tmp_path / "a.pt2").write_bytes(whole[: len(whole) * part // 10])
        with pytest.raises(FileFormatError, match="not a whole archive"):
            read_target(tmp_path / "a.pt2")


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_give_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("junk") / "a.pt2"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="not a whole archive"):
        read_target(path)


def test_the_rules_on_state_run(folder: Path, tmp_path: Path) -> None:
    content = members(folder / "eval.pt2")
    (config,) = (json.loads(d) for n, d in content.items() if n.endswith("_weights_config.json"))
    name = f"/weights/{config['config']['bn.running_var']['path_name']}"
    nan = torch.tensor([1.0, 2.0, float("nan"), 1.0]).numpy().tobytes()
    path = write(
        tmp_path / "a.pt2", {n: nan if n.endswith(name) else d for n, d in content.items()}
    )
    report = sn.check(path, select="SN102")
    assert [(f.paths, f.evidence["first_channel"]) for f in report.findings] == [(("bn",), 2)]
    assert str(report).startswith("a.pt2: exported program, ")


@pytest.mark.parametrize("error", [ValueError(), UnicodeDecodeError("utf-8", b"", 0, 1, "x")])
def test_whatever_zipfile_says_of_a_damaged_archive(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(zipfile.ZipFile, "_RealGetContents", fail)
    with pytest.raises(FileFormatError, match="not a whole archive"):
        read_target(folder / "eval.pt2")
