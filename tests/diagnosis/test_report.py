"""What people see: the head, the findings, the summary; as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from torch import nn

from diagnosis.nets import batches, conv_net, estimated
from stillnorm import check
from stillnorm.diagnosis import Finding, Fix, Report, Verdict
from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.report import Crash, Data, Layer, NotRun
from stillnorm.diagnosis.request import Request
from stillnorm.diagnosis.runs import Head
from stillnorm.reports import Table, text


def finding(code: str = "SN201", severity: str = "error", **more: object) -> Finding:
    how = {"slug": "shared-layer", "paths": ("bn_6",), "message": "bn_6 sees two inputs"} | more
    return Finding(code=code, severity=severity, **how)


SHARED = finding(
    also="bn_2 (3 calls, net.py:39, 41, 43)",
    explains="SN105 on bn_2, bn_6 (not repeated)",
    help="write one norm per call",
    where=("net.py:31", "net.py:33"),
    evidence={"calls": {"bn_6": 2}},
    table=Table(("", "mean", "variance"), (("call 1", "0.61", "0.81"),), "lrr"),
)
STALE = finding(
    "SN105",
    slug="mismatched-statistics",
    paths=("bn_6", "bn_2"),
    message="2 layers are off",
    fix=Fix("estimate the statistics", "unsafe", "recalibrate", ("bn_6", "bn_2")),
)
LOOSE = finding(
    "SN003",
    "warning",
    slug="unheld-eval",
    message="1 layer is loose",
    fix=Fix("hold the statistics", "safe", "freeze", ("bn_6",)),
)
REMARK = finding("SN114", "info", slug="unreached-layer", paths=("bn_1",), message="never called")


def report(*findings: Finding, **more: object) -> Report:
    fields: dict[str, object] = {
        "model": "Keras_Cifar2",
        "layers": tuple(Layer(f"bn_{i}", "BatchNorm2d", 32) for i in (1, 2, 6)),
        "findings": findings,
        "not_run": (),
        "crashed": (),
        "head": Head(0.214, 0.984, 0.264),
        "verdict": Verdict("repair", "repair SN201 before anything else", 64),
        "data": Data(8, 24, 64, 512, "cpu"),
        "seconds": 1.94,
    }
    return Report(**(fields | more), _evidence=Evidence(Request(nn.Identity()), None))


def test_the_screen() -> None:
    shown = report(SHARED, LOOSE, REMARK, not_run=(NotRun("SN114", "cannot train"),))
    assert str(shown) == (
        """\
Keras_Cifar2: 3 BatchNorm2d, 8 of 24 batches of 64, cpu, 1.9 s

  eval (running statistics)   21.4 %   what you ship
  batch statistics            98.4 %   what you trained
  recalibrated                26.4 %   so stale statistics are not the cause

error[SN201] shared-layer: bn_6 sees two inputs
  --> bn_6  BatchNorm2d(32)   net.py:31, 33
   |          mean  variance
   |  call 1  0.61      0.81
   = also: bn_2 (3 calls, net.py:39, 41, 43)
   = explains: SN105 on bn_2, bn_6 (not repeated)
   = help: write one norm per call

warning[SN003] unheld-eval: 1 layer is loose
  --> bn_6  BatchNorm2d(32)
   = fix: (safe) hold the statistics

1 error, 1 warning, 1 note (--verbose). 1 safe fix: report.fix()
verdict: repair SN201 before anything else
not run: SN114: cannot train"""
    )


def test_three_findings_are_open_and_the_rest_take_a_line_each() -> None:
    many = [replace(LOOSE, message=f"finding {i}") for i in range(5)]
    lines = str(report(*many)).splitlines()
    assert sum(line.startswith("  --> ") for line in lines) == 3
    assert "warning[SN003] unheld-eval: finding 4" in lines


def test_verbose_opens_everything_and_names_what_was_not_run() -> None:
    missed = (NotRun("SN105", "needs batches"), NotRun("SN114", "needs batches"))
    many = [replace(LOOSE, message=f"finding {i}") for i in range(5)]
    shown = report(*many, REMARK, not_run=missed)
    verbose = text.write(shown.document(verbose=True))
    assert verbose.count("  --> ") == 6
    assert "info[SN114] unreached-layer: never called" in verbose
    assert "not run: SN105, SN114: needs batches" in verbose
    assert "not run: 2 rules: needs batches" in str(shown)


def test_a_fix_that_needs_data_says_what_it_measured() -> None:
    shown = str(report(STALE))
    assert "--> bn_6, bn_2" in shown
    expected = "(unsafe, estimated from these batches) estimate the statistics, measured: eval"
    assert " ".join(f"{expected} 21.4 % -> 26.4 %".split()) in " ".join(shown.split())
    assert "1 unsafe fix: report.fix(unsafe=True)" in shown


@pytest.mark.parametrize(
    ("recalibrated", "said"),
    [
        (0.98, "so stale statistics are the cause"),
        (0.5, "so stale statistics are part of the cause"),
        (0.22, "so stale statistics are not the cause"),
    ],
)
def test_what_the_third_number_means(recalibrated: float, said: str) -> None:
    assert said in str(report(head=Head(0.214, 0.984, recalibrated)))


def test_where_there_is_no_gap_nothing_is_a_cause() -> None:
    assert "cause" not in str(report(head=Head(0.97, 0.98, 0.975)))


def test_scores_that_are_no_fractions_are_shown_as_they_are() -> None:
    shown = str(report(head=Head(-3.1, -0.5, None)))
    assert "-3.10" in shown
    assert "%" not in shown


def test_nothing_found_is_said() -> None:
    assert "nothing found" in str(report())


def test_a_rule_of_ours_that_failed_is_said() -> None:
    crashed = (Crash("SN105", "ValueError: no"),)
    assert "internal: SN105 failed itself: ValueError: no" in str(report(crashed=crashed))


def test_json_has_every_number_and_no_layout() -> None:
    data = json.loads(report(SHARED, STALE, LOOSE, REMARK).to_json())
    assert [f["code"] for f in data["findings"]] == ["SN201", "SN105", "SN003", "SN114"]
    assert data["findings"][0]["evidence"] == {"calls": {"bn_6": 2}}
    assert data["findings"][1]["fix"]["paths"] == ["bn_6", "bn_2"]
    assert data["head"] == {"eval": 0.214, "batch": 0.984, "recalibrated": 0.264}
    assert data["verdict"]["choice"] == "repair"
    assert all("table" not in f or f["table"] is None for f in data["findings"])


def test_a_real_report_is_json_too() -> None:
    net = estimated(conv_net())
    net[1].running_mean += 3
    net[4].momentum = 0.99
    data = json.loads(check(net, batches(), score=lambda out, _: out.mean()).to_json())
    assert [f["code"] for f in data["findings"]] == ["SN105", "SN108"]
    assert data["findings"][0]["evidence"]["layers"]["1"]["mean"] > 1
