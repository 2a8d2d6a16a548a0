"""What people see: the head, the findings, the summary; as text and as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, estimated
from stillnorm import check
from stillnorm.diagnosis import CODES, Finding, Fix, Report, Verdict
from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.request import Request
from stillnorm.diagnosis.evidence.runs import Head
from stillnorm.diagnosis.report import Crash, Data, Fixed, Layer, NotRun
from stillnorm.diagnosis.writing.schema import schema
from stillnorm.reports import Table, text
from stillnorm.tracing import Site

SCHEMA = Path(__file__).parents[2] / "docs" / "check.schema.json"


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
    fix=Fix("estimate the statistics", "unsafe", "recalibrate", ("bn_6", "bn_2"), measured=0.264),
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
        "head": Head(0.214, 0.984, 0.264, 512),
        "verdict": Verdict("repair", "repair SN201 before anything else", 64),
        "data": Data(8, 24, 64, 512, "cpu"),
        "gap": None,
        "seconds": 1.94,
        "ran": tuple(CODES),
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

1 error, 1 warning, 1 note (report.to_text(verbose=True)). 1 safe fix: report.fix()
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
    assert "not run: SN105, SN114 need batches" in verbose
    assert "not run: 2 rules need batches" in str(shown)
    assert shown.to_text(verbose=True) == verbose


def test_what_rules_lack_is_told_by_need_the_most_first() -> None:
    needs = {"SN105": "train_step=", "SN114": "batches", "SN201": "batches", "SN501": "group="}
    not_run = tuple(NotRun(code, f"needs {need}") for code, need in needs.items())
    shown = report(not_run=(*not_run, NotRun("SN203", "there is one class only")))
    told = "not run: 2 rules need batches, 1 needs train_step=, 1 needs group=\n"
    assert f"{told}not run: SN203: there is one class only" in str(shown)
    command_line = text.write(shown.document(command_line=True))
    assert "2 rules need --data, 1 needs --train-step, 1 needs a process group" in command_line


def test_rules_in_preview_are_one_phrase() -> None:
    previews = [code for code, rule in CODES.items() if rule.preview][:2]
    assert len(previews) == 2
    ran = tuple(code for code in CODES if code not in previews)
    assert "not run: 2 preview rules are off" in str(report(ran=ran))
    assert f"off ({', '.join(previews)})" in report(ran=ran).to_text(verbose=True)
    assert "preview" not in str(report(ran=("SN002",)))
    without_batches = (NotRun("SN105", "needs batches"),)
    ran = tuple(code for code in ran if code != "SN105")
    together = "not run: 1 rule needs batches; 2 preview rules are off"
    assert together in str(report(ran=ran, not_run=without_batches))


def test_on_the_command_line_fixes_are_options() -> None:
    shown = text.write(report(STALE, LOOSE, REMARK).document(command_line=True))
    assert "1 note (--verbose)" in shown
    fixes = "1 safe fix: --fix. 1 unsafe fix: --fix --unsafe-fixes --out FILE"
    assert fixes in " ".join(shown.split())


def test_what_was_fixed_is_said() -> None:
    fixes = (finding.fix for finding in (LOOSE, STALE))
    done = tuple(Fixed(code, fix) for code, fix in zip(("SN003", "SN105"), fixes, strict=True))
    shown = str(report(fixed=done))
    assert "2 fixed: SN003 (hold the statistics), SN105 (estimate the statistics)\n" in shown


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
    assert said in str(report(head=Head(0.214, 0.984, recalibrated, 512)))


def test_where_there_is_no_gap_nothing_is_a_cause() -> None:
    assert "cause" not in str(report(head=Head(0.97, 0.98, 0.975, 512)))


def test_scores_that_are_no_fractions_are_shown_as_they_are() -> None:
    shown = str(report(head=Head(-3.1, -0.5, None, 512)))
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
    assert data["head"] == {"eval": 0.214, "batch": 0.984, "recalibrated": 0.264, "samples": 512}
    assert data["verdict"]["choice"] == "repair"
    assert all("table" not in f for f in data["findings"])
    assert data["schema_version"] == 1


# ------------------------------------------------------------------------------- other writers


def test_annotations_name_the_line_from_the_root(tmp_path: Path) -> None:
    inside = Site(str(tmp_path / "src" / "net.py"), 31, "Net.forward")
    outside = Site(str(tmp_path.parent / "resnet.py"), 93, "BasicBlock.forward")
    found = replace(SHARED, sites=(outside, inside))
    first, second = report(found, LOOSE).to_github(tmp_path).splitlines()
    assert first.startswith("::error file=src/net.py,line=31,title=SN201 shared-layer::bn_6 sees")
    assert "%0Alayers: bn_6%0Ahelp: write one norm per call" in first
    assert second == "::warning title=SN003 unheld-eval::1 layer is loose%0Alayers: bn_6"
    assert "file=" not in report(replace(SHARED, sites=(outside,))).to_github(tmp_path)
    crashed = report(crashed=(Crash("SN105", "ValueError: no"),)).to_github()
    assert crashed == "::error title=stillnorm::internal: SN105 failed itself: ValueError: no"


def test_a_real_finding_is_annotated_in_this_file() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(5 + 3 * self.bn(x).relu())

    shown = check(Shared(), batches(), select="SN201").to_github(Path(__file__).parent)
    line = next(
        i for i, line in enumerate(Path(__file__).read_text().splitlines(), 1) if "5 + 3 *" in line
    )
    assert f"::error file={Path(__file__).name},line={line},title=SN201" in shown


def test_the_pull_request_has_a_row_and_a_fold_for_each_finding() -> None:
    shown = report(SHARED, STALE, LOOSE, REMARK).to_markdown()
    assert shown.startswith("### Keras\\_Cifar2: 3 BatchNorm2d")
    assert "| error | SN201 shared-layer | bn\\_6 | bn\\_6 sees two inputs |" in shown
    assert shown.count("<details>") == 4
    assert "what you ship" in shown


def test_the_notebook_shows_what_print_shows() -> None:
    shown = report(SHARED, REMARK)._repr_html_()
    assert "bn_6 sees two inputs" in shown
    assert "never called" not in shown


def test_json_is_as_its_schema_says() -> None:
    published = json.loads(SCHEMA.read_text())
    validator = jsonschema.Draft202012Validator(published)
    validator.check_schema(published)
    net = estimated(conv_net(momentum=0.99))
    net[1].running_mean += 3
    real = (
        check(net, batches(), score=lambda out, _: out.mean()),
        check(nn.Sequential(nn.BatchNorm1d(3, momentum=0))),
        check(nn.Sequential()),
        report(SHARED, STALE, LOOSE, REMARK, head=Head(float("nan"), 0.5, None, 512)),
        report(fixed=(Fixed("SN003", LOOSE.fix),), crashed=(Crash("SN105", "ValueError: no"),)),
    )
    for shown in real:
        validator.validate(json.loads(shown.to_json()))
    assert not validator.is_valid({"schema_version": 1})


def test_the_schema_is_current() -> None:
    assert SCHEMA.read_text() == schema() + "\n", (
        "python -m stillnorm.diagnosis.writing.schema writes it"
    )


def test_a_real_report_is_json_too() -> None:
    net = estimated(conv_net())
    net[1].running_mean += 3  # the first norm: the data are others, whatever they score
    net[4].momentum = 0.99
    data = json.loads(check(net, batches(), score=lambda out, _: out.mean()).to_json())
    assert [f["code"] for f in data["findings"]] == ["SN105", "SN108", "SN204"]
    assert data["findings"][0]["evidence"]["layers"]["1"]["mean"] > 1


def test_a_fingerprint_is_of_the_rule_and_the_layers_alone() -> None:
    def of(code: str, *paths: str, message: str = "") -> str:
        return Finding(code, "a-slug", "error", paths, message).fingerprint

    assert of("SN201", "a", "b", message="x 2.1") == of("SN201", "b", "a", message="x 2.3")
    distinct = {of("SN201", "a"), of("SN201", "b"), of("SN202", "a"), of("SN201", "a", "b")}
    assert len(distinct) == 4
    net = estimated(conv_net())
    net[1].running_mean += 3
    first, second = (json.loads(check(net, batches(seed=s)).to_json()) for s in (1, 2))
    told = [[f["fingerprint"] for f in report["findings"]] for report in (first, second)]
    assert told[0] == told[1]
    assert first["findings"][0]["evidence"] != second["findings"][0]["evidence"]
