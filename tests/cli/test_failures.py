"""Failures promise: one clear line that says whose fault it is and where, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
import torch

import stillnorm
from diagnosis.graphs import graph, norm, save, tensors
from stillnorm.cli import check as check_command
from stillnorm.cli.failures import describe, is_the_users

OURS = str(Path(stillnorm.__file__).parent / "somewhere.py")


def raised(*files: str) -> Exception:
    """Return an error raised in the last of the files, each of which calls the next."""
    calls: list[dict[str, object]] = []
    for file in reversed(files):
        body = "calls.pop()['f'](calls)" if calls else "1 / 0"
        namespace: dict[str, object] = {}
        exec(compile(f"def f(calls):\n    {body}", file, "exec"), namespace)
        calls.append(namespace)
    try:
        calls.pop()["f"](calls)
    except ZeroDivisionError as error:
        return error.with_traceback(error.__traceback__.tb_next)
    raise AssertionError


@pytest.mark.parametrize(
    ("files", "users"),
    [
        (("net.py",), True),
        ((OURS, "net.py"), True),
        ((OURS, "net.py", torch.__file__), True),
        (("net.py", OURS), False),
        ((OURS, torch.__file__), False),
        ((OURS, json.__file__), False),
        (("net.py", json.__file__), True),
    ],
)
def test_the_innermost_line_outside_of_libraries_decides(files, users):
    assert is_the_users(raised(*files)) == users


def test_an_error_is_described_with_the_users_line():
    error = raised(OURS, "net.py", torch.__file__)
    assert describe(error) == "ZeroDivisionError: division by zero (net.py:2)"


def test_an_error_of_the_users_is_one_line_with_its_place(fails):
    fact, help = fails("check", "net.py:healthy", "--data", "net.py:of_five_channels")
    assert "expected input[4, 5, 8, 8] to have 3 channels" in fact
    assert "--traceback" in help


def test_an_error_in_the_users_forward_names_the_line(fails):
    fact, _ = fails("check", "net.py:make", "--data", "net.py:of_five_channels")
    assert fact.endswith("(net.py:21)")


def test_traceback_shows_all_of_it(run):
    result = run("--traceback", "inspect", "net.py:raises")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "in raises" in result.stderr
    assert result.stderr.splitlines()[-2].startswith("error: net.py:raises raised ValueError")


def test_an_error_of_ours_is_3_and_says_so(run, monkeypatch):
    def broken(*args, **kwargs):
        return {}["nothing"]

    monkeypatch.setattr("stillnorm.diagnosis.runner.choose", broken)
    broken.__code__ = broken.__code__.replace(co_filename=check_command.__file__)
    result = run("check", "net.py:healthy")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert "error: stillnorm itself failed: KeyError: 'nothing'" in result.stderr
    assert "report" in result.stderr.splitlines()[-1]


def test_an_error_of_a_score_is_the_users(run, project):
    (project / "net.py").write_text(
        (project / "net.py").read_text() + "\n\ndef bad(output, batch):\n    return batch[7]\n"
    )
    result = run("check", "net.py:healthy", "--data", "net.py:val", "--score", "net.py:bad")
    assert result.exit_code == 2
    assert "IndexError" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_interrupt_is_130(run):
    result = run("inspect", "net.py:interrupted")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "interrupted"


@pytest.mark.parametrize(
    "options",
    [
        ("exits.py:net", "--data", "net.py:val"),
        ("net.py:healthy", "--data", "exits.py:batches"),
        ("net.py:healthy", "--data", "net.py:val", "--score", "exits.py:score"),
        ("net.py:healthy", "--data", "net.py:val", "--train-step", "exits.py:step"),
    ],
)
def test_code_that_exits_is_not_a_clean_model(fails, project, options):
    (project / "exits.py").write_text(
        "import sys\n"
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Sequential):\n"
        "    def forward(self, x):\n"
        "        sys.exit(0)\n"
        "net = Net(nn.BatchNorm2d(3))\n"
        "def batches():\n"
        "    yield torch.randn(4, 3, 8, 8)\n"
        "    sys.exit(0)\n"
        "def score(output, batch):\n"
        "    sys.exit(0)\n"
        "def step(model, batch):\n"
        "    sys.exit(0)\n"
    )
    fact, _ = fails("check", *options)
    assert fact.startswith("your code ended the program: SystemExit: 0 (exits.py:")


def test_help_and_version_still_end_with_0(run):
    assert run("--version").exit_code == run("check", "--help").exit_code == 0


def test_the_help_for_a_damaged_graph_is_ours(fails, project):
    (project / "a.onnx").write_bytes(b"\x80\x02junk" * 50)
    assert "export it again" in fails("check", "a.onnx")[1]
    save(project / "b.onnx", graph([norm("bn")], tensors("bn")))
    model = onnx.load(project / "b.onnx")
    onnx.save(model, project / "b.onnx", save_as_external_data=True, size_threshold=0, location="d")
    (project / "d").unlink()
    assert "keep it beside the .onnx" in fails("check", "b.onnx")[1]


def test_no_name_reaches_the_terminal_as_a_command(run, project):
    result = run("check", "a\n::error::x\x1b[31m.pt")
    assert result.exit_code == 2
    assert not any(line.startswith("::") for line in result.stderr.splitlines())
    assert "\x1b[31m.pt" not in result.stderr
