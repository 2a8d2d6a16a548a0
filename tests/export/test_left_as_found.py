"""Whatever happens, the model and the file that was there are as they were."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import sympy  # noqa: F401 - sets a warning filter when it is first imported
import torch
from torch import Tensor, nn

import stillnorm as sn
from export.nets import Net, exported, images, net, net_with, settle
from stillnorm.errors import BatchError, ExportError, FileFormatError
from stillnorm.export import files, proving, writing
from support.fingerprint import Fingerprint
from support.interruptions import Interruption

BOTH = pytest.mark.parametrize("suffix", [".onnx", ".pt2"])


def mixed() -> nn.Module:
    """In train mode, with a layer in eval, one that is held, a hook, gradients and a cache."""

    class Caching(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.head(x)
            self.count = getattr(self, "count", 0) + 1
            return self.seen

    torch.manual_seed(0)
    model = settle(Caching()).train()
    model.bn.eval()
    sn.freeze(model, "late")
    model.conv.register_forward_hook(lambda module, args, output: 2 * output)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    model.fc.requires_grad_(False)
    return model


def state_of_torch() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.compiler.is_compiling(),
        torch.onnx.is_in_onnx_export(),
        torch.jit.isinstance,
        logging.root.manager.disable,
        list(warnings.filters),
        sys.stdout,
        sys.stderr,
    )


class Watch:
    """What there is to see before and after."""

    def __init__(self, model: nn.Module, folder: Path, suffix: str) -> None:
        self.model, self.path = model, folder / f"net{suffix}"
        self.path.write_bytes(b"what was there")
        self.before, self.torch = Fingerprint(model), state_of_torch()

    def is_as_it_was(self) -> None:
        assert Fingerprint(self.model).differences(self.before) == []
        assert state_of_torch() == self.torch
        assert self.path.read_bytes() == b"what was there"
        assert [path.name for path in self.path.parent.iterdir()] == [self.path.name]


@BOTH
def test_after_success(tmp_path: Path, suffix: str) -> None:
    model = mixed()
    model.seen = model(images())  # what the user's forward left
    before, torch_before = Fingerprint(model), state_of_torch()
    exported(model, images(), tmp_path, suffix)
    assert Fingerprint(model).differences(before) == []
    assert state_of_torch() == torch_before


class Merging(Net):
    """As LoRA layers do: in eval mode something is added to a weight, which is rounded."""

    merged = False

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        with torch.no_grad():
            if self.merged == mode:
                self.conv.weight.add_(-1.0 if mode else 1.0)
                self.merged = not mode
        return self


@BOTH
def test_a_train_of_the_model_s_own(tmp_path: Path, suffix: str) -> None:
    model = settle(Merging())
    before = Fingerprint(model)
    exported(model, images(), tmp_path, suffix)
    assert Fingerprint(model).differences(before) == []


STEPS: list[tuple[str, Any, str]] = [
    ("the trace", writing, "trace"),
    ("the rules", writing, "must_be_exportable"),
    ("torch's own decompositions", torch.export.ExportedProgram, "run_decompositions"),
    ("the runtime", onnxruntime, "InferenceSession"),
    ("the comparison", proving, "errors"),
    ("its place", os, "replace"),
]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(("name", "where", "function"), STEPS, ids=[s[0] for s in STEPS])
def test_onnx_interrupted_at_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, where: Any, function: str, kind: Any
) -> None:
    watch = Watch(mixed(), tmp_path, ".onnx")
    # Before the work of the last step: after it the file is in its place.
    with monkeypatch.context() as patch:
        before = function in ("replace", "InferenceSession")
        step = Interruption(patch, where, function, 1, kind, before=before)
        # An exporter that fails is asked once more, for a fixed batch size.
        with pytest.raises((kind, ExportError)):
            sn.export_onnx(watch.model, images(), watch.path, dynamic=False)
        assert step.calls
    watch.is_as_it_was()


@pytest.mark.parametrize("nth", range(1, 9))
@pytest.mark.parametrize("kind", [KeyboardInterrupt, ValueError])
def test_the_forward_raises(tmp_path: Path, nth: int, kind: type[BaseException]) -> None:
    """In the first look, in a rule, inside torch's capture, or in the comparison."""
    calls: list[bool] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        self.half_way = x
        calls.append(torch.compiler.is_compiling())
        if len(calls) == nth:
            raise kind("step")
        return self.head(x)

    watch = Watch(net_with(forward), tmp_path, ".pt2")
    try:
        sn.export.export_program(watch.model, images(), watch.path)
    except (KeyboardInterrupt, ValueError, BatchError, ExportError):
        watch.is_as_it_was()
    else:  # it was an attempt, and another one succeeded; or there are fewer calls
        assert kind is ValueError or len(calls) < nth
        assert Fingerprint(watch.model).differences(watch.before) == []
    assert state_of_torch() == watch.torch


def test_the_forward_raises_inside_the_capture(tmp_path: Path) -> None:
    """Ctrl-C while torch has put fake tensors into the model, on both ways."""
    for suffix, write in ((".onnx", sn.export_onnx), (".pt2", sn.export.export_program)):

        def forward(self: Any, x: Tensor) -> Tensor:
            self.cached = x
            if torch.compiler.is_compiling():
                raise KeyboardInterrupt
            return self.head(x)

        folder = tmp_path / suffix
        folder.mkdir()
        watch = Watch(net_with(forward), folder, suffix)
        with pytest.raises(KeyboardInterrupt):
            write(watch.model, images(), watch.path)
        watch.is_as_it_was()


def test_exports_in_threads_wait_for_one_another(tmp_path: Path) -> None:
    """torch's exporters cannot run beside one another; nor is stdout put back in order then."""
    before, shared = state_of_torch(), net()
    models = [net(), net(), shared, shared]
    fingerprints = [Fingerprint(model) for model in models]
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(sn.export.export_program, model, images(), tmp_path / f"{i}.pt2")
            for i, model in enumerate(models)
        ]
        assert [job.result().max_error for job in jobs] == [0, 0, 0, 0]
    assert state_of_torch() == before
    for model, fingerprint in zip(models, fingerprints, strict=True):
        assert Fingerprint(model).differences(fingerprint) == []


# ------------------------------------------------------------------------------- files


@BOTH
def test_where_nothing_can_be_written(tmp_path: Path, suffix: str) -> None:
    """Said before the work."""
    write = sn.export_onnx if suffix == ".onnx" else sn.export.export_program
    model = net_with(lambda self, x: pytest.fail("the model was run"))
    with pytest.raises(FileFormatError, match="there is no folder"):
        write(model, images(), tmp_path / "none" / f"net{suffix}")
    with pytest.raises(FileFormatError, match="does not end in"):
        write(model, images(), tmp_path / "net.bin")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(FileFormatError, match="is a folder"):
        write(model, images(), tmp_path / f"folder{suffix}")
    for odd, said in (("", "does not end in"), (f"a\0{suffix}", "null"), ("a" * 300, "too long")):
        with pytest.raises(FileFormatError, match=said):
            write(model, images(), tmp_path / f"{odd}{suffix}" if len(odd) > 9 else odd)


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(**kwargs: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", denied)
    with pytest.raises(FileFormatError, match="cannot be written: Permission denied"):
        exported(net(), images(), tmp_path, ".pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own writer of programs ends the process: it is given memory to write to."""

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    real = torch.export.save
    given: list[Any] = []
    monkeypatch.setattr(torch.export, "save", lambda p, f: (given.append(f), real(p, f)))
    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(torch.onnx.ONNXProgram, "save", full)
    for suffix in (".pt2", ".onnx"):
        with pytest.raises(FileFormatError, match="No space left"):
            exported(net(), images(), tmp_path, suffix)
    assert {type(file) for file in given} == {io.BytesIO}
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_followed_and_permissions_stay(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (real / "v1.pt2").write_bytes(b"old")
    (real / "v1.pt2").chmod(0o640)
    (tmp_path / "net.pt2").symlink_to(real / "v1.pt2")
    exported(net(), images(), tmp_path, ".pt2")
    assert (tmp_path / "net.pt2").is_symlink()
    assert (real / "v1.pt2").stat().st_mode & 0o777 == 0o640
    assert (real / "v1.pt2").stat().st_size > 1000


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch take every model for one of more than 2 GB."""
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 0)


@pytest.mark.usefixtures("small_files")
def test_large_tensors_lie_beside_the_file(tmp_path: Path) -> None:
    report = exported(net(), images(), tmp_path, ".onnx")
    assert report.data == tmp_path / "net.onnx.data"
    assert report.size == report.path.stat().st_size + report.data.stat().st_size
    assert "keep net.onnx.data beside it" in str(report)
    x = images(3)
    runtime = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    (y,) = runtime.run(None, {"x": x.numpy()})
    model = net().eval()
    torch.testing.assert_close(torch.from_numpy(y), model(x).detach())


@pytest.mark.usefixtures("small_files")
def test_two_files_are_replaced_both_or_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.onnx").write_bytes(b"old graph")
    (tmp_path / "net.onnx.data").write_bytes(b"old tensors")
    with monkeypatch.context() as patch:
        Interruption(patch, os, "replace", 3, OSError, before=True)
        with pytest.raises(FileFormatError, match="cannot be written"):
            exported(net(), images(), tmp_path, ".onnx")
    assert (tmp_path / "net.onnx").read_bytes() == b"old graph"
    assert (tmp_path / "net.onnx.data").read_bytes() == b"old tensors"
    assert len(list(tmp_path.iterdir())) == 2
