"""`stillnorm check` promises: the library's report, and exit codes that a pipeline can rely on."""

from __future__ import annotations

import json

import pytest

from stillnorm.diagnosis import CODES


def test_check_prints_the_report_and_fails_on_an_error(run):
    result = run("check", "net.py:make", "--data", "net.py:val", "--score", "net.py:accuracy")
    assert result.exit_code == 1
    assert "error[SN201] shared-layer" in result.stdout
    assert "eval (running statistics)" in result.stdout


def test_check_of_a_healthy_model_is_0(run):
    assert run("check", "net.py:healthy").exit_code == 0


def test_check_as_json(run):
    result = run("check", "net.py:zero_momentum", "--format", "json")
    assert result.exit_code == 1
    assert [f["code"] for f in json.loads(result.stdout)["findings"]] == ["SN002"]


@pytest.mark.parametrize(
    ("fail_on", "code"), [("error", 1), ("warning", 1), ("info", 1), ("never", 0)]
)
def test_fail_on(run, fail_on, code):
    assert run("check", "net.py:zero_momentum", "--fail-on", fail_on).exit_code == code


def test_a_warning_fails_only_when_asked_to(run, project):
    (project / "keras.py").write_text(
        "from torch import nn\nnet = nn.Sequential(nn.BatchNorm2d(3, momentum=0.99))\n"
    )
    assert "warning[SN108]" in run("check", "keras.py:net").stdout
    assert run("check", "keras.py:net").exit_code == 0
    assert run("check", "keras.py:net", "--fail-on", "warning").exit_code == 1


def test_select_and_ignore(run, fails):
    assert run("check", "net.py:zero_momentum", "--ignore", "SN002").exit_code == 0
    assert run("check", "net.py:zero_momentum", "--select", "SN1").exit_code == 0
    assert run("check", "net.py:zero_momentum", "--select", "SN1,SN002").exit_code == 1
    assert "no rule is called 'SN9'" in fails("check", "net.py:make", "--select", "SN9")[0]


def test_a_score_needs_data(run):
    result = run("check", "net.py:make", "--score", "net.py:accuracy")
    assert result.exit_code == 2
    assert "--score needs --data" in result.stderr


def test_a_rule_that_crashed_is_never_clean(run, monkeypatch):
    def crash(self, evidence):
        raise ZeroDivisionError

    monkeypatch.setattr(CODES["SN002"], "find", crash)
    assert run("check", "net.py:healthy").exit_code == 3
