"""A baseline promises: known faults are not reported, new ones are; its file is easy to review."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from diagnosis.nets import conv_net
from stillnorm import check
from stillnorm.diagnosis import Report
from stillnorm.diagnosis.baseline import Baseline
from stillnorm.errors import FileFormatError

EMPTY = Baseline("known.json", {})


def report(*momenta: float, select: str = "SN002,SN108") -> Report:
    return check(nn.Sequential(*(nn.BatchNorm1d(4, momentum=m) for m in momenta)), select=select)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    known = EMPTY.updated(report(0, 0.1, 0, 0.99))
    known.write(tmp_path / "known.json")
    assert Baseline.read(tmp_path / "known.json") == known
    assert json.loads((tmp_path / "known.json").read_text()) == {
        "stillnorm_baseline": 1,
        "models": {"Sequential": {"SN002": ["0", "2"], "SN108": ["3"]}},
    }


def test_the_file_is_the_same_whatever_the_order(tmp_path: Path) -> None:
    first = {"Net": {"SN2": ("b", "a"), "SN1": ("é",)}, "A": {}}
    second = {"A": {}, "Net": {"SN1": ("é",), "SN2": ("a", "b")}}
    Baseline("", first).write(tmp_path / "1")
    Baseline("", second).write(tmp_path / "2")
    text = (tmp_path / "1").read_text(encoding="utf-8")
    assert text == (tmp_path / "2").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert '"é"' in text


def test_what_is_known_is_not_reported_and_what_is_new_is() -> None:
    known = EMPTY.updated(report(0, 0.1))
    assert known.hidden(report(0, 0.1)).findings == ()
    (finding,) = known.hidden(report(0, 0)).findings
    assert finding.paths == ("1",)
    assert "suppressed by known.json: 0" in finding.note
    assert [f.code for f in known.hidden(report(0.99, 0.1)).findings] == ["SN108"]


def test_two_layers_of_five_are_new() -> None:
    known = EMPTY.updated(report(0, 0.1, 0, 0.1, 0))
    (finding,) = known.hidden(report(0, 0, 0, 0, 0)).findings
    assert finding.paths == ("1", "3")
    assert "of these layers 3 are suppressed by known.json: 0, 2, 4" in finding.note


def test_another_model_is_not_covered() -> None:
    known = EMPTY.updated(report(0))
    assert known.hidden(replace(report(0), model="Other")).findings != ()


def test_updating_keeps_other_models_and_rules_that_did_not_run() -> None:
    own = {"SN105": ("a",), "SN002": ("gone",), "SN108": ("gone",)}
    after = Baseline("", {"Sequential": own, "Net": {"S": ("b",)}}).updated(report(0))
    assert after.models == {
        "Sequential": {"SN105": ("a",), "SN002": ("0",)},
        "Net": {"S": ("b",)},
    }


def test_what_is_gone_is_told_of_rules_that_ran() -> None:
    known = Baseline("", {"Sequential": {"SN002": ("0", "1"), "SN105": ("0",), "SN999": ("0",)}})
    assert known.gone(known.hidden(report(0, 0.1))) == [("SN002", "1")]
    assert known.gone(known.hidden(report(0, 0))) == []
    assert known.gone(known.hidden(report(0.1, 0.1, select="SN108"))) == []


def test_a_finding_about_no_layer_can_be_known() -> None:
    (finding,) = report(0).findings
    found = replace(report(0), findings=(replace(finding, paths=(), fix=None),))
    assert EMPTY.updated(found).hidden(found).findings == ()


def test_all_that_was_found_is_known() -> None:
    net = conv_net(momentum=0)
    known = EMPTY.updated(check(net))
    assert known.hidden(check(net)).findings == ()


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not JSON"),
        ("[]", "is not a baseline"),
        ('{"models": {}}', "is not a baseline"),
        ('{"stillnorm_baseline": 2}', "a baseline of version 2"),
        ('{"stillnorm_baseline": 1}', '"models" has to hold paths'),
        ('{"stillnorm_baseline": 1, "models": {"N": []}}', '"models" has to hold paths'),
        ('{"stillnorm_baseline": 1, "models": {"N": {"S": [1]}}}', '"models" has to hold paths'),
        (b"\xff\xfe", "is not JSON"),
    ],
)
def test_a_file_that_is_none(tmp_path: Path, content: str | bytes | None, fact: str) -> None:
    file = tmp_path / "known.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileFormatError, match=fact) as error:
        Baseline.read(file)
    assert f"--write-baseline {file} makes one" in error.value.help


def test_a_file_that_is_nested_without_end(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 200_000)
    with pytest.raises(FileFormatError, match="is not JSON"):
        Baseline.read(tmp_path / "a.json")
