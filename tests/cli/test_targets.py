"""Targets promise: every documented form works, and everything else is one clear line."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from stillnorm.cli.targets import load_data, load_function, load_model
from stillnorm.errors import TargetError
from stillnorm.norms import find_norms


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("net.py:make", "Net"),
        ("./net.py:make", "Net"),
        ("net:make", "Net"),
        ("net.py:Net", "Net"),
        ("net.py:Net()", "Net"),
        ("net.py:Net(4)", "Net"),
        ("net.py:Net(width=4)", "Net"),
        ("net.py:Namespace.inner", "Sequential"),
        ("net.py:partial", "Net"),
        ("torch.nn:BatchNorm2d(3, eps=1e-3)", "BatchNorm2d"),
        ("torch:nn.Identity", "Identity"),
    ],
)
def test_every_form_of_a_model(project, target, kind):
    model = load_model(target)
    assert isinstance(model, nn.Module)
    assert type(model).__name__ == kind


def test_an_absolute_path(project):
    assert type(load_model(f"{project}/net.py:make")).__name__ == "Net"


def test_literal_arguments_arrive(project):
    (project / "args.py").write_text("def make(*args, **kwargs):\n    return [args, kwargs]\n")
    target = "args.py:make('a:b', -1.5, [1, (2,)], x={'k': None}, y=True)"
    assert load_data(target) == [("a:b", -1.5, [1, (2,)]), {"x": {"k": None}, "y": True}]


def test_arguments_are_never_evaluated(project):
    with pytest.raises(TargetError, match="not a literal"):
        load_model("net.py:Net(__import__('os').mkdir('evaluated'))")
    assert not (project / "evaluated").exists()


def test_a_model_that_is_there_already_is_taken_as_it_is(project):
    (project / "ready.py").write_text("from torch import nn\nnet = nn.Linear(1, 1)\n")
    assert load_model("ready.py:net") is load_model("ready.py:net")


def test_a_file_is_run_once(project):
    """Model, data and score of one file share its classes."""
    (project / "once.py").write_text("class A: pass\na = A()\ndef f(x): return isinstance(x, A)\n")
    assert load_function("once.py:f", "x")(load_data("once.py:a"))


def test_neighbours_of_a_file_can_be_imported(project):
    folder = project / "deep"
    folder.mkdir()
    (folder / "neighbour.py").write_text("value = 7\n")
    (folder / "main_file.py").write_text("import neighbour\nvalue = [neighbour.value]\n")
    assert load_data("deep/main_file.py:value") == [7]


def test_a_file_may_be_called_like_a_module(project):
    (project / "json.py").write_text("value = [1]\n")
    import json

    assert load_data("json.py:value") == [1]
    assert sys.modules["json"] is json


def test_data_is_what_a_function_returns_or_what_is_there(project):
    assert len(load_data("net.py:val")) == 4
    assert load_data("net.py:number") == 3
    assert isinstance(load_data("torch:ones(2)"), torch.Tensor)


def test_a_function_is_not_called(project):
    assert load_function("net.py:accuracy", "output", "batch").__name__ == "accuracy"


@pytest.mark.parametrize(
    ("target", "fact", "help"),
    [
        ("net.py", "does not say what in the file makes the model", "net.py:Net or net.py:make"),
        ("nett.py:make", "there is no file nett.py", "nearest: net.py"),
        ("nett.py", "there is no file nett.py", "nearest: net.py"),
        ("nowhere/x.py:make", "there is no file nowhere/x.py", "the folder now is"),
        ("net.py:mak", "there is no 'mak' in net.py", "nearest: make"),
        ("net.py:Namespace.iner", "there is no 'iner' in net.py.Namespace", "nearest: inner"),
        ("net.py:xqz", "there is no 'xqz' in net.py", "write package.module:factory"),
        ("nett:make", "there is no module 'nett'", "name a file"),
        ("torch.nope:make", "there is no module 'torch.nope'", "name a file"),
        ("folder/net:make", "folder/net is not a .py file", "write package.module:factory"),
        ("net.py:gives_a_dict", "gives a dict, not a torch.nn.Module", "returns the model"),
        ("net.py:number", "gives an int, not a torch.nn.Module", "returns the model"),
        ("net.py:number()", "an int cannot be called", "write package.module:factory"),
        ("net.py:raises", "net.py:raises raised ValueError: no such thing (net.py:", "--traceback"),
        ("net.py:quits", "net.py:quits raised SystemExit: 2 (net.py:", "--traceback"),
        ("net.py:needs", "net.py:needs(a, b=1): missing a required argument: 'a'", 'needs(a=...)"'),
        ("net.py:Net(depth=3)", "got an unexpected keyword argument 'depth'", "write the call"),
        ("net.py:Net(width=w)", "has an argument that is not a literal", "function of your own"),
        ("net.py:Net(**{})", "has an argument that is not a literal", "function of your own"),
        ("net.py:make +", "'make +' in net.py:make + is not Python", "package.module:factory"),
        ("net.py:[make]", "net.py:[make] is neither a name nor a call of one", "write package"),
        ("run3.ckpt", "run3.ckpt cannot be read: No such file", "check the path"),
        ("resnet18", "'resnet18' is not a target", "write package.module:factory"),
        (":make", "':make' is not a target", "write package.module:factory"),
        ("", "'' is not a target", "write package.module:factory"),
        ("broken.py:make", "importing broken.py raised SyntaxError", "--traceback"),
        ("needing.py:make", "importing needing.py raised ModuleNotFoundError", "--traceback"),
        ("needing:make", "importing needing raised ModuleNotFoundError", "--traceback"),
        ("keras/net.py:make", "ModuleNotFoundError: no tensorflow", "KERAS_BACKEND=torch"),
    ],
)  # fmt: skip
def test_what_goes_wrong_is_said_in_one_line(project, fails, target, fact, help):
    (project / "broken.py").write_text("def make(:\n")
    (project / "needing.py").write_text("import not_installed_anywhere\n")
    (project / "keras").mkdir()  # as Keras does, whose default backend TensorFlow is
    raises = "raise ModuleNotFoundError('no tensorflow', name='tensorflow')"
    (project / "keras" / "net.py").write_text(raises)
    said, advice = fails("inspect", target)
    assert fact in said
    assert help in advice


@pytest.mark.parametrize(
    ("score", "fact"),
    [
        ("net.py:number", "net.py:number is an int, not a function"),
        ("net.py:one_argument", "net.py:one_argument(output) is called with (output, batch)"),
        ("net.py:healthy()", "net.py:healthy() makes a Sequential, not a function"),
        ("net.py:Net", "net.py:Net is a class, not a function"),
    ],
)
def test_a_score_that_is_none_is_said_before_anything_runs(fails, score, fact):
    said, _ = fails("check", "net.py:make", "--data", "net.py:val", "--score", score)
    assert fact in said


def test_a_failed_import_leaves_nothing_behind(project):
    (project / "flaky.py").write_text("raise RuntimeError('no')\n")
    with pytest.raises(TargetError):
        load_model("flaky.py:make")
    assert "flaky" not in sys.modules
    (project / "flaky.py").write_text("from torch import nn\nnet = nn.Identity()\n")
    assert isinstance(load_model("flaky.py:net"), nn.Identity)


def test_as_a_new_user_would(project):
    """The installed program, in a process of its own, on a file of one's own."""
    done = subprocess.run(
        [sys.executable, "-c", "from stillnorm.cli.main import main; main()",
         "inspect", "net.py:make"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Net: 1 norm layer, train mode now")


def test_a_file_of_keras_is_a_model(project, run, fails):
    keras = pytest.importorskip("keras")
    norm = keras.layers.BatchNormalization(name="bn")
    keras.Sequential([keras.Input((4,)), norm]).save(project / "model.keras")
    assert [found.path for found in find_norms(load_model("model.keras"))] == ["bn"]
    assert "bn    BatchNormalization" in run("inspect", "model.keras").stdout
    (project / "broken.keras").write_text("no archive")
    assert "broken.keras cannot be loaded" in fails("inspect", "broken.keras")[0]
