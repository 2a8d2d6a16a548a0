"""Checkpoints are read whole or refused with one clear error, and nothing in them is ever run."""

from __future__ import annotations

import argparse
import ast
import os
import pickle
import shlex
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stillnorm.errors import FileFormatError, StillnormWarning
from stillnorm.state import files, read_state, write_tensors
from support import layers
from support.fingerprint import bits

State = dict[str, Tensor]


def state() -> State:
    return dict(layers.conv_net().state_dict())


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(bits(a[key]) == bits(b[key]) for key in a)


def refusal(path: Path) -> FileFormatError:
    with pytest.raises(FileFormatError) as caught:
        read_state(path)
    assert str(path) in caught.value.fact
    assert "\n" not in caught.value.fact
    assert caught.value.help
    return caught.value


# ------------------------------------------------------------------------------ what is understood


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".PTH"])
def test_every_suffix_of_torch_save(tmp_path: Path, suffix: str) -> None:
    torch.save(state(), tmp_path / f"a{suffix}")
    assert same(read_state(tmp_path / f"a{suffix}"), state())
    assert same(read_state(str(tmp_path / f"a{suffix}")), state())


def test_safetensors(tmp_path: Path) -> None:
    safetensors.torch.save_file(state(), tmp_path / "a.safetensors")
    assert same(read_state(tmp_path / "a.safetensors"), state())


def test_the_format_before_zip_archives(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    assert same(read_state(tmp_path / "a.pth"), state())


@pytest.mark.parametrize(
    "nest",
    [
        lambda s: {"state_dict": s, "epoch": 3},
        lambda s: {"model": s, "ema": {"other": torch.ones(1)}},
        lambda s: {"model_state_dict": s, "optimizer": {"state": {}}},
        lambda s: {"ema": s},
        lambda s: {"state_dict_ema": s},
        lambda s: {"module": s},
        lambda s: {"model": {"state_dict": s}},
        lambda s: {"epoch": torch.tensor(3), "state_dict": s},
        lambda s: {"state_dict": {f"module.{k}": t for k, t in s.items()}},
        lambda s: {"model": {f"_orig_mod.{k}": t for k, t in s.items()}},
        lambda s: s | {"extra": 3, 5: torch.ones(1)},
        lambda s: {"state_dict": {k: nn.Parameter(t, False) for k, t in s.items()}},
    ],
)
def test_nested_state_dicts_and_wrapper_prefixes(tmp_path: Path, nest: object) -> None:
    torch.save(nest(state()), tmp_path / "a.ckpt")
    read = read_state(tmp_path / "a.ckpt")
    assert same(read, state())
    assert not any(tensor.requires_grad for tensor in read.values())


def test_a_layer_called_like_a_known_key_is_not_taken_for_one(tmp_path: Path) -> None:
    own = {"model": torch.ones(2), "ema.weight": torch.ones(1)}
    torch.save(own, tmp_path / "a.pt")
    assert same(read_state(tmp_path / "a.pt"), own)


@pytest.mark.parametrize(
    ("nest", "key", "others"),
    [
        (lambda s: s, "", ()),
        (lambda s: {"model": s, "ema": s}, "model", ("ema",)),
        (lambda s: {"ema": {"module": s}, "epoch": torch.tensor(3)}, "ema.module", ()),
        (lambda s: {"model": {"state_dict": s, "n": torch.ones(1)}}, "model.state_dict", ()),
        (
            lambda s: {"state_dict_ema": s, "state_dict": s, "optimizer": {"a": torch.ones(1)}},
            "state_dict",
            ("state_dict_ema",),
        ),
    ],
)
def test_which_of_several_states_was_read_is_known(
    tmp_path: Path, nest: object, key: str, others: tuple[str, ...]
) -> None:
    torch.save(nest(state()), tmp_path / "a.ckpt")
    read = files.read_checkpoint(tmp_path / "a.ckpt")
    assert (read.key, read.others) == (key, others)
    assert same(read.state, state())


def test_zip_archives_are_mapped_and_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: calls.append(k) or load(*a, **k))
    torch.save(state(), tmp_path / "new.pt")
    torch.save(state(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    read_state(tmp_path / "new.pt")
    read_state(tmp_path / "old.pt")
    assert [call["mmap"] for call in calls] == [True, False]
    assert all(call["weights_only"] is True for call in calls)


# ------------------------------------------------------------------------------- what is not run


class Evil:
    """Unpickled, it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.marker, "w"))


class EvilShell(Evil):
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, (f"touch {self.marker}",))


@pytest.mark.parametrize("evil", [Evil, EvilShell])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle 2"])
def test_a_malicious_file_is_refused_and_not_run(
    tmp_path: Path, evil: type[Evil], form: str
) -> None:
    marker, path = tmp_path / "pwned", tmp_path / "a.pt"
    content = {"state_dict": state(), "extra": evil(marker)}
    if form in ("zip", "legacy"):
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    else:
        path.write_bytes(pickle.dumps(evil(marker), protocol=2 if form == "pickle 2" else None))
    refusal(path)
    assert not marker.exists()
    with open(path, "rb") as file:  # the test can fail: unpickling does run it
        if form == "pickle":
            pickle.load(file).close() if evil is Evil else pickle.load(file)
            assert marker.exists()


def test_a_call_that_no_checkpoint_needs_is_not_advised(tmp_path: Path) -> None:
    torch.save({"x": EvilShell(tmp_path / "pwned")}, tmp_path / "a.pt")
    error = refusal(tmp_path / "a.pt")
    assert "posix.system" in error.fact or "nt.system" in error.fact
    assert "weights_only" not in str(error)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("content", "fact", "before"),
    [
        (
            {"state_dict": {"w": torch.ones(2)}, "args": argparse.Namespace(lr=1)},
            "holds more than tensors (argparse.Namespace)",
            "by the key it has: ",
        ),
        (
            nn.Sequential(nn.Linear(2, 1, bias=False)),
            "is a pickled model (torch.nn.modules.container.Sequential), not a state dict",
            "save model.state_dict() instead; if you trust its source, convert it once: ",
        ),
    ],
    ids=["objects beside tensors", "a whole model"],
)
def test_objects_are_refused_with_the_line_that_converts_the_file(
    tmp_path: Path, content: object, fact: str, before: str, zipped: bool
) -> None:
    path = tmp_path / "it's run 3.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    error = refusal(path)
    assert fact in error.fact
    line = error.help.partition(before)[2]
    command = shlex.split(line)
    assert command[0] == "python"
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=60)
    read = read_state(path.with_suffix(".safetensors"))
    assert [tensor.numel() for tensor in read.values()] == [2]


def test_a_model_of_a_class_from_another_program_is_named(tmp_path: Path) -> None:
    """Its class was in that program's __main__, which this one's has not: that is no damage."""
    program = (
        "import sys, torch\n"
        "class Net(torch.nn.Linear): pass\n"
        "torch.save(Net(2, 1), sys.argv[1])\n"
        "torch.save({'model': Net(2, 1)}, sys.argv[2])\n"
    )
    whole, inside = tmp_path / "whole.pt", tmp_path / "inside.pt"
    subprocess.run([sys.executable, "-c", program, whole, inside], check=True, timeout=60)
    assert "is a pickled model (__main__.Net), not a state dict" in refusal(whole).fact
    assert "holds more than tensors (__main__.Net)" in refusal(inside).fact


def test_torchscript_archives_are_refused_with_their_own_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.script(nn.BatchNorm1d(2)), path)
    error = refusal(path)
    assert "TorchScript" in error.fact
    command = shlex.split(error.help.partition(": ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True, timeout=60)
    assert same(read_state(tmp_path / "a.safetensors"), dict(nn.BatchNorm1d(2).state_dict()))


def test_an_old_torch_is_warned_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(state(), tmp_path / "a.pt")
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    with pytest.warns(StillnormWarning, match="CVE-2026-24747") as caught:
        read_state(tmp_path / "a.pt")
    assert caught[0].filename == __file__


def test_no_other_way_to_unpickle_exists_in_the_library() -> None:
    """There is one call of torch.load, with weights_only=True, and no pickle."""
    nodes = [
        node
        for file in Path(files.__file__).parents[1].rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
    ]
    calls = [
        {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        for node in nodes
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert [call["weights_only"] for call in calls] == ["True"]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not names & {"pickle", "dill", "joblib", "cloudpickle", "torch.serialization"}


# ------------------------------------------------------------------------------ what cannot be read


def test_missing_file(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "a.pt").fact


def test_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    error = refusal(tmp_path)
    assert "is a folder" in error.fact
    assert "model.safetensors" in error.help


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert "is empty" in refusal(tmp_path / name).fact


@pytest.mark.parametrize("name", ["a.npz", "a", "a.pt.txt"])
def test_unknown_suffix(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert ".safetensors" in refusal(tmp_path / name).help


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_a_file_cut_short_anywhere(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pt")
    if form == "safetensors":
        safetensors.torch.save_file(state(), path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=form == "zip")
    whole = path.read_bytes()
    for part in range(1, 40):
        path.write_bytes(whole[: len(whole) * part // 40])
        error = refusal(path)
        assert "damaged" in error.help
        assert "weights_only" not in str(error)


@given(st.binary(min_size=1, max_size=200), st.sampled_from(["a.pt", "a.safetensors"]))
def test_any_bytes_give_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, name: str
) -> None:
    path = tmp_path_factory.mktemp("junk") / name
    path.write_bytes(data)
    refusal(path)


@pytest.mark.parametrize(
    "content",
    [{"epoch": 3, "lr": 0.1}, {"a\nb\x1b": 3}, {}, [torch.ones(2)], torch.ones(2), 5, "text"],
)
def test_files_without_a_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert "no state dict" in refusal(tmp_path / "a.pt").fact


def test_a_state_dict_that_contains_itself(tmp_path: Path) -> None:
    content: dict[str, object] = {}
    content["model"] = content
    torch.save(content, tmp_path / "a.pt")
    refusal(tmp_path / "a.pt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(state(), path)
    path.chmod(0)
    refusal(path)


# ------------------------------------------------------------------------------------- writing


def test_what_is_written_is_read(tmp_path: Path) -> None:
    tied = torch.arange(6.0)
    tensors = {"a": tied, "b": tied, "c": tied.view(2, 3).T, "d": torch.ones(2, requires_grad=True)}
    write_tensors(tmp_path / "a.safetensors", tensors, {"by": "test"})
    read, metadata = files.read_tensors(tmp_path / "a.safetensors")
    assert same(read, tensors)
    assert metadata == {"by": "test"}


@pytest.mark.parametrize("at", ["open", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, error: BaseException
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise error

    if at == "open":
        monkeypatch.setattr("builtins.open", fail)
    else:
        monkeypatch.setattr(os, at, fail)
    wanted = FileFormatError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(wanted):
        write_tensors(path, {"a": torch.ones(2)}, {})
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_the_bytes_are_on_the_disk_before_the_name_is_theirs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: order.append("fsync") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: order.append("replace") or replace(a, b))
    files.write_whole(tmp_path / "a", b"x")
    assert order[:2] == ["fsync", "replace"]
    assert (tmp_path / "a").read_bytes() == b"x"


def test_permissions_and_links_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_bytes(b"old")
    real.chmod(0o640)
    link.symlink_to(real)
    files.write_whole(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_new_file_has_the_permissions_of_new_files(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    files.write_whole(tmp_path / "a", b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("name", ["missing/a", "file/a", "folder"])
def test_places_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileFormatError, match="cannot be written"):
        files.write_whole(tmp_path / name, b"x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.skipif(os.name != "posix", reason="named pipes and devices of Unix")
def test_nothing_takes_the_place_of_a_pipe_or_a_device(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_whole(pipe, b"x")
    assert os.read(reader, 9) == b"x"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    (tmp_path / "null").symlink_to(os.devnull)
    files.write_whole(tmp_path / "null", b"x")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert sorted(os.listdir(tmp_path)) == ["null", "pipe"]


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="needs /dev/stdout")
@pytest.mark.parametrize("piped", [True, False])
def test_stdout_is_written_to_where_it_goes(tmp_path: Path, piped: bool) -> None:
    code = (
        "from stillnorm.state.files import write_whole; print('a', flush=True); "
        "write_whole('/dev/stdout', b'b'); print('c')"
    )
    with open(tmp_path / "out", "wb") as out:
        to = subprocess.PIPE if piped else out
        ran = subprocess.run([sys.executable, "-c", code], stdout=to, check=True)
    assert (ran.stdout if piped else (tmp_path / "out").read_bytes()) == b"a\nbc\n"


@pytest.mark.parametrize(
    "error",
    [zipfile.BadZipFile("x"), UnicodeDecodeError("utf-8", b"", 0, 1, "x"), NotImplementedError()],
)
def test_a_model_whose_archive_is_damaged_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    torch.save(layers.conv_net(), tmp_path / "a.pt")
    assert "pickled model" in refusal(tmp_path / "a.pt").fact

    def fail(*args: object) -> bytes:
        raise error

    monkeypatch.setattr(zipfile.ZipFile, "open", fail)
    assert "holds more than tensors" in refusal(tmp_path / "a.pt").fact
