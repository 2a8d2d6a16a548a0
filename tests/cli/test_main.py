"""The program promises: an instant `--help`, the result alone on stdout, bad usage is 2."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from stillnorm.cli.main import main

NO_TORCH = """
import sys
{first}
from stillnorm.cli.main import main
try:
    main({args!r})
except SystemExit as end:
    assert end.code in (0, 2), end.code
sys.exit(9 if "torch" in sys.modules else 0)
"""


def imports_torch(*args: str, first: str = "") -> bool:
    """Run the program in a process of its own and tell whether torch was imported."""
    code = NO_TORCH.format(args=list(args), first=first)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode in (0, 9), done.stderr
    return done.returncode == 9


@pytest.mark.parametrize(
    "args",
    [
        ("--help",),
        ("--version",),
        ("check", "--help"),
        ("inspect", "--help"),
        ("recalibrate", "--help"),
        ("freeze", "x"),
    ],
    ids=" ".join,
)
def test_help_does_not_import_torch(args):
    assert not imports_torch(*args)


def test_the_test_above_can_fail():
    assert imports_torch("--help", first="import torch")


def test_the_program_is_installed():
    (script,) = entry_points(group="console_scripts", name="stillnorm")
    assert script.load() is main


def test_help_lists_the_commands_and_says_why_freeze_is_none(run):
    result = run("--help")
    assert result.exit_code == 0
    for name in (
        "inspect",
        "check",
        "explain",
        "diff",
        "recalibrate",
        "fold",
        "export",
        "port",
        "demo",
    ):
        assert f"\n  {name} " in result.stdout
    assert "no freeze command: a hold lives in the process" in " ".join(result.stdout.split())


@pytest.mark.parametrize("name", ["freeze", "unfreeze"])
def test_freeze_says_why_it_is_none(run, name):
    result = run(name, "net.py:make")
    assert result.exit_code == 2
    assert "a hold lives in the process" in result.stderr


@pytest.mark.parametrize("args", [("chekc", "x"), ("inspect",), ("check", "net.py:make", "--nope")])
def test_bad_usage_is_2(run, args):
    assert run(*args).exit_code == 2


def test_only_the_result_is_on_stdout(run):
    """What the user's own code prints goes to stderr."""
    result = run("inspect", "net.py:make")
    assert result.stdout.startswith("Net: 1 norm layer")
    assert "printed on import" in result.stderr
    assert "printed by the factory" in result.stderr


def test_a_pipe_gets_no_colours(run):
    result = run("check", "net.py:make", "--data", "net.py:val")
    assert "error[SN201]" in result.stdout
    assert "\x1b" not in result.output


def test_threads_are_left_alone(run):
    threads = torch.get_num_threads()
    run("inspect", "net.py:make")
    assert torch.get_num_threads() == threads
