"""Failures promise: one clear line that says whose fault it is and where, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import stillnorm
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
