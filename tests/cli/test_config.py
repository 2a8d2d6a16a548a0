"""The configuration promises: defaults of options from the nearest file, and no misreading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from stillnorm.cli.config import read
from stillnorm.errors import ConfigError

WHOLE = """
[tool.other]
select = "x"

[tool.stillnorm]
select = ["SN1", "shared-layer"]
extend-select = "SN109"
ignore = ["SN105"]
fail-on = "warning"
max-batches = 3
baseline = "ci/known.json"

[tool.stillnorm.per-path-ignores]
"backbone.*" = ["SN105", "SN001"]
"aux" = "SN114"
"head.bn" = { rules = ["SN203"], reason = "contrastive" }
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(content: str) -> Path:
        file = tmp_path / "pyproject.toml"
        file.write_text(content)
        return file

    return write


def test_every_key_is_read(write, tmp_path):
    file = write(WHOLE)
    config = read(None, tmp_path)
    assert config.file == file
    assert config.options == {
        "select": "SN1,shared-layer",
        "extend_select": "SN109",
        "ignore": "SN105",
        "fail_on": "warning",
        "max_batches": 3,
        "baseline": tmp_path / "ci/known.json",
    }
    assert config.ignores == {
        "backbone.*": (("SN105", "SN001"), ""),
        "aux": (("SN114",), ""),
        "head.bn": (("SN203",), "contrastive"),
    }


def test_the_nearest_file_with_the_table_counts(write, tmp_path):
    write("[tool.stillnorm]\nfail-on = 'never'\n")
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "a" / "pyproject.toml").write_text("[tool.ruff]\nline-length = 100\n")
    assert read(None, inner).options == {"fail_on": "never"}
    (inner / "pyproject.toml").write_text("[tool.stillnorm]\n")
    assert read(None, inner).options == {}
    assert read(None, inner).file == inner / "pyproject.toml"


def test_another_file_can_be_named(write, tmp_path):
    write("[tool.stillnorm]\nfail-on = 'never'\n")
    other = tmp_path / "strict.toml"
    other.write_text("[tool.stillnorm]\nfail-on = 'info'\n")
    assert read(other, tmp_path).options == {"fail_on": "info"}
    assert read(other, tmp_path).name == "strict.toml"


@pytest.mark.parametrize(
    ("content", "fact", "help"),
    [
        ("selct = 'SN1'", "has no key 'selct'", "nearest: select"),
        ("fail_on = 'error'", "has no key 'fail_on'", "nearest: fail-on"),
        ("per-path-ignore = {}", "has no key 'per-path-ignore'", "nearest: per-path-ignores"),
        ("zzz = 1", "has no key 'zzz'", "the keys are select, extend-select"),
        ("select = 1", "select = 1 cannot be meant", "codes, their beginnings, or slugs"),
        ("select = []", "select = [] cannot be meant", "codes"),
        ("ignore = ['SN1', 2]", "cannot be meant", "codes"),
        ("fail-on = 'warn'", "fail-on = 'warn' cannot be meant", "one of error, warning"),
        ("fail-on = []", "fail-on = [] cannot be meant", "one of error, warning"),
        ("max-batches = 0", "max-batches = 0 cannot be meant", "a number from 1 on"),
        ("max-batches = true", "cannot be meant", "a number from 1 on"),
        ("max-batches = 1.5", "cannot be meant", "a number from 1 on"),
        ("baseline = ['a']", "cannot be meant", "a file's name"),
        ("per-path-ignores = 'SN1'", "per-path-ignores is not a table", "backbone"),
        ("per-path-ignores.bn = 1", "'bn' = 1 cannot be meant", "reason"),
        ("per-path-ignores.bn = {rule = 'SN1'}", "cannot be meant", "reason"),
        ("per-path-ignores.bn = {rules = 'SN1', reason = 1}", "cannot be meant", "reason"),
        ("per-path-ignores.bn = {rules = 'SN1', why = 'x'}", "cannot be meant", "reason"),
    ],
)
def test_what_cannot_be_meant_is_an_error(write, tmp_path, content, fact, help):
    write(f"[tool.stillnorm]\n{content}\n")
    with pytest.raises(ConfigError) as error:
        read(None, tmp_path)
    assert error.value.fact.startswith("pyproject.toml: ")
    assert fact in error.value.fact
    assert help in error.value.help


@pytest.mark.parametrize(
    ("content", "fact"),
    [("[tool", "is not TOML"), ("[tool]\nstillnorm = 1", "tool.stillnorm is not a table")],
)
def test_a_file_that_is_broken(write, tmp_path, content, fact):
    write(content)
    with pytest.raises(ConfigError, match=fact):
        read(None, tmp_path)


def test_a_named_file_must_be_there_and_have_the_table(write, tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "none.toml", tmp_path)
    with pytest.raises(ConfigError, match=r"has no \[tool.stillnorm\]"):
        read(write("[tool.other]\n"), tmp_path)


# ---------------------------------------------------------------------------- in `check`


@pytest.fixture
def configure(project) -> Callable[[str], None]:
    def configure(content: str) -> None:
        (project / "pyproject.toml").write_text(f"[tool.stillnorm]\n{content}\n")

    return configure


def test_the_configuration_is_the_default_and_the_command_line_replaces_it(run, configure):
    configure("ignore = ['SN002']")
    assert run("check", "net.py:zero_momentum").exit_code == 0
    assert run("check", "net.py:zero_momentum", "--ignore", "SN001").exit_code == 1
    configure("fail-on = 'never'")
    assert run("check", "net.py:zero_momentum").exit_code == 0
    assert run("check", "net.py:zero_momentum", "--fail-on", "error").exit_code == 1


def test_max_batches_is_configured(run, configure):
    configure("max-batches = 2")
    assert "2 batches of 16" in run("check", "net.py:make", "--data", "net.py:val").stdout


def test_rules_are_ignored_at_paths(run, configure):
    configure('per-path-ignores."1" = { rules = ["SN002"], reason = "an experiment" }')
    result = run("check", "net.py:zero_momentum")
    assert result.exit_code == 0
    assert "1 finding suppressed by pyproject.toml" in result.stdout
    assert "SN002 on 1 (an experiment)" in run("check", "net.py:zero_momentum", "--verbose").stdout


def test_a_rule_that_does_not_exist_is_an_error_before_the_exit_code_counts(fails, configure):
    configure("per-path-ignores.bn = 'SN999'")
    assert "no rule is called 'SN999'" in fails("check", "net.py:healthy")[0]


def test_a_configuration_that_cannot_be_meant_ends_the_command(fails, configure):
    configure("selct = 'SN1'")
    fact, help = fails("check", "net.py:healthy")
    assert fact == "pyproject.toml: [tool.stillnorm] has no key 'selct'"
    assert help == "nearest: select"


def test_other_commands_do_not_read_it(run, configure):
    configure("selct = 'SN1'")
    assert run("inspect", "net.py:healthy").exit_code == 0
    assert run("check", "--help").exit_code == 0


def test_a_file_that_is_nested_without_end(write, tmp_path):
    write("a = " + "[" * 100_000)
    with pytest.raises(ConfigError, match="is not TOML"):
        read(None, tmp_path)
