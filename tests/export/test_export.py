"""What is written: for every way to call a model, the same numbers at every batch size."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import UserDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.optim.swa_utils import AveragedModel

import stillnorm as sn
from export.nets import Net, exported, images, net, net_with
from stillnorm.errors import BatchError, ExportError, ModelError, StateError
from support.fingerprint import Fingerprint

BOTH = pytest.mark.parametrize("suffix", [".onnx", ".pt2"])


def run_onnx(path: Path, *inputs: Tensor) -> list[Tensor]:
    runtime = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [port.name for port in runtime.get_inputs()]
    arrays = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return [torch.from_numpy(array) for array in runtime.run(None, arrays)]


def run(path: Path, *inputs: Tensor) -> Any:
    if path.suffix == ".onnx":
        return run_onnx(path, *inputs)[0]
    return torch.export.load(path).module()(*inputs)


@BOTH
def test_a_model_in_train_mode_is_exported_as_it_is_in_eval_mode(
    tmp_path: Path, suffix: str
) -> None:
    """Dropout is gone, statistics are the running ones, and the model trains on."""
    model = net()
    before = Fingerprint(model)
    report = exported(model, images(), tmp_path, suffix)
    assert Fingerprint(model).differences(before) == []
    assert [one.batch_size for one in report.runs] == [2, 1, 3]
    assert report.max_error < 1e-5
    assert report.rms_error <= report.max_error or report.max_error == 0
    assert report.fixed_batch == ""
    assert (report.remaining, report.absorbed) == (
        (("late",), ("bn",)) if suffix == ".onnx" else (("bn", "late"), ())
    )
    assert report.size == report.path.stat().st_size
    with sn.eval_mode(model), torch.no_grad():
        for n in (1, 2, 7):
            torch.testing.assert_close(run(report.path, images(n, 9)), model(images(n, 9)))


def test_the_report(tmp_path: Path) -> None:
    report = exported(net(), images(), tmp_path, ".onnx")
    told = json.loads(report.to_json())
    assert told["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 3, 8, 8]}]
    assert told["outputs"][0]["shape"] == ["batch", 5]
    assert told["remaining"] == ["late"]
    assert told["runs"][1]["batch_size"] == 1
    assert report.opset is not None
    said = str(report)
    assert said.startswith("net.onnx computes what the model does in eval mode")
    assert "norms: 1 as batch norms, 1 folded into weights or written as other operations" in said
    assert "max error / max value" in said
    assert told["findings"] == []
    assert "takes x float32 (batch, 3, 8, 8)" in said
    with pytest.raises(AttributeError):
        report.size = 0  # type: ignore[misc]


CALLS = {
    "dict": (lambda self, x: {"a": self.head(x), "b": x.mean((1, 2, 3))}, images(), {}),
    "nested": (lambda self, x: (self.head(x), [x + 1, None]), images(), {}),
    "several inputs": (lambda self, a, b: self.head(a) - 2 * self.head(b), (images(),) * 2, {}),
    "keywords in another order": (
        lambda self, a, b: self.head(a) - 2 * self.head(b),
        {"b": images(2, 1), "a": images(2, 2)},
        {},
    ),
    "a mapping that is no dict": (
        lambda self, x: self.head(x),
        UserDict({"x": images()}),
        {},
    ),
    "any keywords": (
        lambda self, **k: self.head(k["u"] - k["v"]),
        {"v": images(), "u": images(2, 9)},
        {},
    ),
    "a mapping last": (
        lambda self, a, d: self.head(a) * d["w"],
        (images(), {"w": torch.ones(2, 1)}),
        {},
    ),
    "a list": (lambda self, pair: self.head(pair[0] - pair[1]), ([images(), images(2, 1)],), {}),
    "int and None": (lambda self, a, k, m: self.head(a) * k, (images(), 3, None), {}),
    "an input without use": (lambda self, a, n: self.head(a), (images(), torch.arange(7)), {}),
    "a number first": (lambda self, k, a: self.head(a) * k, (torch.tensor(2.0), images()), {}),
    "never meeting": (lambda self, a, b: (self.head(a), self.head(b)), (images(), images()), {}),
    "an input that comes back": (lambda self, x: x, images(), {}),
    "writes to its input": (lambda self, x: self.head(x.mul_(2)), images(), {}),
    "an argmax": (lambda self, x: self.head(x).argmax(1), images(), {}),
    "forward": (
        lambda self, x, k: self.head(x) * k,
        {"image": images(), "label": 3},
        {"forward": lambda model, e: model(e["image"], 2)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_programs_of_every_call(tmp_path: Path, name: str) -> None:
    forward, example, options = CALLS[name]
    model = net_with(forward)
    before = Fingerprint(model)
    report = exported(model, example, tmp_path, ".pt2", **options)
    assert [one.batch_size for one in report.runs] == [2, 1, 3]
    assert report.max_error == 0
    assert Fingerprint(model).differences(before) == []
    assert not any(path.startswith("model.") for path in report.remaining)


@pytest.mark.parametrize(
    "name",
    ["nested", "keywords in another order", "a mapping last", "int and None", "never meeting",
     "an input without use", "an input that comes back", "forward"],
)  # fmt: skip
def test_onnx_of_every_call(tmp_path: Path, name: str) -> None:
    forward, example, options = CALLS[name]
    report = exported(net_with(forward), example, tmp_path, ".onnx", **options)
    assert [one.batch_size for one in report.runs] == [2, 1, 3]
    assert report.max_error < 1e-5


@BOTH
def test_two_inputs_that_are_one_tensor_in_the_example(tmp_path: Path, suffix: str) -> None:
    """Exporters make them one input: then the file is wrong, and right on the example."""
    model = net_with(lambda self, a, b: self.head(a) - 2 * self.head(b))
    x = images()
    report = exported(model, (x, x), tmp_path, suffix)
    with sn.eval_mode(model), torch.no_grad():
        a, b = images(2, 1), images(2, 2)
        torch.testing.assert_close(run(report.path, a, b), model(a, b))


def test_numbers_among_the_outputs_are_compared(tmp_path: Path) -> None:
    model = net_with(lambda self, x: (self.head(x), 7, None, x.shape[0], x.sum().item()))
    report = exported(model, images(), tmp_path, ".pt2")
    assert [port.dtype for port in report.outputs] == ["float32", "int", "int", "float"]
    assert [one.batch_size for one in report.runs] == [2, 1, 3]
    model = net_with(lambda self, x: (self.head(x), 1 if x.shape[0] < 3 else 2))
    report = exported(model, images(), tmp_path, ".pt2")
    assert [one.batch_size for one in report.runs] == [2]
    assert report.fixed_batch


class Counting(Net):
    """It counts its forwards in a buffer, which nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.head(x)


@pytest.mark.parametrize("n", [1, 2])
def test_buffers_are_in_the_file_as_they_are_in_the_model(tmp_path: Path, n: int) -> None:
    """And not as the looks before, or a first attempt, have left them."""
    exported(Counting(), images(n), tmp_path, ".pt2")
    program = torch.export.load(tmp_path / "net.pt2")
    assert program.state_dict["count"] == 0


def test_a_first_attempt_leaves_nothing_in_the_file(tmp_path: Path) -> None:
    class Pairs(Counting):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling() and len(x) != 2:
                raise ValueError("pairs only")
            return super().forward(x)

    report = exported(Pairs(), images(), tmp_path, ".pt2")
    assert report.fixed_batch == "the model itself takes no other"
    assert torch.export.load(report.path).state_dict["count"] == 0


def test_a_shared_norm_has_the_name_that_all_reports_give_it(tmp_path: Path) -> None:
    model = net()
    model.again = model.bn
    for whole in (model, AveragedModel(model)):
        report = exported(whole, images(), tmp_path, ".pt2")
        assert (report.remaining, report.absorbed) == (("bn", "late"), ())


def test_tokens(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(10, 4)
            self.bn = nn.BatchNorm1d(4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.bn(self.words(ids).mean(1))

    report = exported(Words(), torch.randint(10, (3, 6)), tmp_path, ".onnx")
    assert [str(port) for port in report.inputs] == ["ids int64 (batch, 6)"]
    assert [str(port) for port in report.outputs] == ["output float32 (batch, 4)"]


def test_half_precision(tmp_path: Path) -> None:
    report = exported(net().half(), images().half(), tmp_path, ".onnx")
    assert report.outputs[0].dtype == "float16"
    assert 0 < report.max_error < 1e-2


def test_what_onnxruntime_cannot_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="onnxruntime does not run the file") as caught:
        exported(net().double(), images().double(), tmp_path, ".onnx")
    assert "model.float()" in caught.value.help
    assert list(tmp_path.iterdir()) == []
    assert exported(net().double(), images().double(), tmp_path, ".pt2").max_error == 0


# ------------------------------------------------------------------------------- the batch size


@BOTH
def test_an_example_of_one_sample_leaves_the_batch_open(tmp_path: Path, suffix: str) -> None:
    """torch takes a size of one for a constant; it is given two."""
    report = exported(net(), images(1), tmp_path, suffix)
    assert [one.batch_size for one in report.runs] == [1, 2, 3]
    assert isinstance(report.inputs[0].shape[0], str)


@BOTH
def test_a_batch_size_that_the_forward_fixes_is_said(tmp_path: Path, suffix: str) -> None:
    model = net_with(lambda self, x: self.head(x).view(2, 5))
    report = exported(model, images(), tmp_path, suffix)
    assert [one.batch_size for one in report.runs] == [2]
    assert report.inputs[0].shape == (2, 3, 8, 8)
    why = {".onnx": "the model itself takes no other", ".pt2": "the forward makes it a constant"}
    assert report.fixed_batch == why[suffix]
    assert "the batch size is fixed" in str(report)


def test_a_batch_size_that_is_wrong_in_the_file_is_fixed(tmp_path: Path) -> None:
    """A branch on the size is decided once: by other sizes the file would compute otherwise."""
    model = net_with(lambda self, x: self.head(x) * (2.0 if x.shape[0] > 2 else 1.0))
    report = exported(model, images(2), tmp_path, ".onnx")
    assert [one.batch_size for one in report.runs] == [2]
    assert "off by 0.5 of its largest value" in report.fixed_batch


def test_a_model_of_one_sample_only(tmp_path: Path) -> None:
    model = net_with(lambda self, x: self.head(x).view(5))
    report = exported(model, images(1), tmp_path, ".pt2")
    assert report.fixed_batch.startswith("the model does not take two samples (RuntimeError:")


@BOTH
def test_sizes_as_the_user_says(tmp_path: Path, suffix: str) -> None:
    fixed = exported(net(), images(), tmp_path, suffix, dynamic=False)
    assert (fixed.inputs[0].shape, fixed.fixed_batch) == ((2, 3, 8, 8), "as asked")
    asked = ({0: Dim("n", min=2, max=8), 2: Dim.AUTO},)
    report = exported(net(), images(), tmp_path, suffix, dynamic=asked)
    assert [one.batch_size for one in report.runs] == [2, 3]
    assert [type(size) for size in report.inputs[0].shape] == [str, int, str, int]
    assert suffix == ".pt2" or report.inputs[0].shape[0] == "n"


@BOTH
def test_sizes_that_are_none(tmp_path: Path, suffix: str) -> None:
    for wrong in ("batch", 3):
        with pytest.raises(ExportError, match="is not True, False or shapes"):
            exported(net(), images(), tmp_path, suffix, dynamic=wrong)


def test_sizes_that_do_not_fit_the_call(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="top-level keys"):
        exported(net(), images(), tmp_path, ".pt2", dynamic={"nope": {0: Dim.AUTO}})


# ------------------------------------------------------------------------------- hostile inputs


@BOTH
def test_a_branch_on_a_value(
    tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The exporter's first line, and what can be done; its pages of output are kept back."""
    model = net_with(lambda self, x: self.head(x) if x.sum() > 0 else -self.head(x))
    before = Fingerprint(model)
    with pytest.raises(ExportError, match="Could not guard on data-dependent") as caught:
        exported(model, images(), tmp_path, suffix)
    assert "torch.where" in caught.value.help
    assert Fingerprint(model).differences(before) == []
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_what_a_graph_cannot_return(tmp_path: Path) -> None:
    model = net_with(lambda self, x: (self.head(x), 3))
    with pytest.raises(ExportError, match="returns int in its tuple"):
        exported(model, images(), tmp_path, ".onnx")
    exported(model, images(), tmp_path, ".pt2")


@pytest.mark.parametrize(
    ("output", "said", "suffixes"),
    [
        (lambda y: None, "returns no tensor", (".onnx", ".pt2")),
        (lambda y: {}, "returns no tensor", (".onnx", ".pt2")),
        (lambda y: y.sum().item(), "returns no tensor", (".pt2",)),
        (lambda y: (y, "logits"), "returns str in its tuple", (".onnx", ".pt2")),
        (lambda y: y + 0j, "returns complex64, which ONNX does not", (".onnx",)),
        (lambda y: (y, y * torch.nan), "returns NaN or infinity throughout", (".onnx", ".pt2")),
        (lambda y: -torch.inf + y, "returns NaN or infinity throughout", (".pt2",)),
    ],
    ids=["None", "nothing", "a number", "a string", "complex", "NaN", "infinity"],
)
def test_outputs_that_prove_nothing(
    tmp_path: Path, output: Any, said: str, suffixes: tuple[str, ...]
) -> None:
    model = net_with(lambda self, x: output(self.head(x)))
    for suffix in suffixes:
        with pytest.raises(ExportError, match=said):
            exported(model, images(), tmp_path, suffix)
    assert list(tmp_path.iterdir()) == []


def test_complex_inputs(tmp_path: Path) -> None:
    model = net_with(lambda self, x: self.head(x.real))
    with pytest.raises(ExportError, match="takes complex64, which ONNX does not"):
        exported(model, images() + 0j, tmp_path, ".onnx")
    assert exported(model, images() + 0j, tmp_path, ".pt2").max_error == 0


def test_some_infinities_are_compared_as_such(tmp_path: Path) -> None:
    """What is masked out is often minus infinity."""
    model = net_with(lambda self, x: (y := self.head(x)).masked_fill(y < 0, -torch.inf))
    assert exported(model, images(), tmp_path, ".pt2").max_error == 0


@BOTH
def test_a_model_that_goes_by_what_it_has_seen(tmp_path: Path, suffix: str) -> None:
    """Its file would be right once."""
    model = net_with(lambda self, x: self.head(x) * self.bn.num_batches_tracked.add_(1))
    before = Fingerprint(model)
    with pytest.raises(ExportError, match="returns another output each time"):
        exported(model, images(), tmp_path, suffix)
    assert Fingerprint(model).differences(before) == []


@BOTH
def test_a_model_that_draws_random_numbers(tmp_path: Path, suffix: str) -> None:
    model = net_with(lambda self, x: nn.functional.dropout(self.head(x)))
    with pytest.raises(ExportError, match="returns another output each time") as caught:
        exported(model, images(), tmp_path, suffix)
    assert "F.dropout(x, training=self.training)" in caught.value.help
    assert list(tmp_path.iterdir()) == []


class Stuck(Net):
    def train(self, mode: bool = True) -> nn.Module:
        raise RuntimeError("stuck")


@pytest.mark.parametrize(
    ("model", "example", "kind", "said"),
    [
        (net(), torch.randn(2, 5, 8, 8), BatchError, "on the example, the forward raised"),
        (net(), (images(), images()), BatchError, "cannot take a batch"),
        (net(), {"y": images()}, BatchError, "cannot take a batch"),
        (net(), images(0), BatchError, "the example has no samples"),
        (net(), (), BatchError, "cannot take a batch"),
        (nn.Sequential(nn.LazyConv2d(3, 2)), images(), StateError, "LazyConv2d"),
        (torch.jit.script(net().eval()), images(), StateError, "TorchScript"),
        (torch.jit.trace(net().eval(), images()), images(), StateError, "TorchScript"),
        (net().to("meta"), images().to("meta"), StateError, "conv.weight is on the meta device"),
        (net().forward, images(), ModelError, "a method is no torch.nn.Module"),
        (Stuck(), images(), StateError, "eval\\(\\) of the model raised RuntimeError: stuck"),
    ],
    ids=[
        "shape",
        "too many",
        "keyword",
        "empty",
        "nothing",
        "lazy",
        "scripted",
        "traced",
        "meta",
        "no module",
        "eval raises",
    ],
)
@BOTH
def test_what_cannot_be_called(
    tmp_path: Path, suffix: str, model: nn.Module, example: Any, kind: Any, said: str
) -> None:
    with pytest.raises(kind, match=said):
        exported(model, example, tmp_path, suffix)
    assert list(tmp_path.iterdir()) == []


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def made_under_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return net()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (net_with(lambda self, x: Pair(self.head(x), x)), "tensors in dicts, tuples, lists"),
        (net_with(lambda self, x: self.head(x).sort(1)), "tensors in dicts, tuples, lists"),
        (made_under_inference_mode(), "made under torch.inference_mode"),
    ],
    ids=["a named tuple", "a named tuple of torch", "inference tensors"],
)
def test_what_can_be_done_about_what_torch_says(
    tmp_path: Path, model: nn.Module, said: str
) -> None:
    with pytest.raises(ExportError) as caught:
        exported(model, images(), tmp_path, ".pt2")
    assert said in caught.value.help


@pytest.mark.parametrize("how", ["outside", "inside", "in place"])
def test_compiled_models(tmp_path: Path, how: str) -> None:
    model = net()
    if how == "in place":
        model.compile()
    report = exported(
        torch.compile(model)
        if how == "outside"
        else nn.Sequential(torch.compile(model) if how == "inside" else model),
        images(),
        tmp_path,
        ".pt2",
    )
    assert report.max_error == 0
    assert [path.removeprefix("0.") for path in report.remaining] == ["bn", "late"]


def test_the_program_runs_where_stillnorm_is_not(tmp_path: Path) -> None:
    model = net()
    exported(model, images(), tmp_path, ".pt2")
    with sn.eval_mode(model):
        torch.save(model(images(3)).detach(), tmp_path / "y.pt")
    code = (
        "import sys, torch; sys.modules['stillnorm'] = None\n"
        "model = torch.export.load('net.pt2').module()\n"
        "x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))\n"
        "torch.testing.assert_close(model(x), torch.load('y.pt'))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("package", ["onnx", "onnx_ir", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=f"needs the package {package},") as caught:
        sn.export_onnx(net(), images(), tmp_path / "net.onnx")
    assert caught.value.help == "pip install 'stillnorm[onnx]'"


def test_a_wrong_file_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the runtime computes something else, there is an error with the numbers and no file."""
    real = onnxruntime.InferenceSession.run
    monkeypatch.setattr(
        onnxruntime.InferenceSession,
        "run",
        lambda self, *args: [np.asarray(y) * np.float32(1.01) for y in real(self, *args)],
    )
    with pytest.raises(ExportError, match=r"off by 0.01 of its largest value .* at batch size 2"):
        exported(net(), images(), tmp_path, ".onnx")
    assert list(tmp_path.iterdir()) == []
