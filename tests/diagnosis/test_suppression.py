"""What is accepted is promised to be out of findings, fixes and verdict, and to be counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from diagnosis.nets import conv_net, data, estimated
from stillnorm import check
from stillnorm.diagnosis import Finding, Report
from stillnorm.diagnosis.suppression import Ignore, ignoring
from stillnorm.errors import RuleError

BY = "pyproject.toml"


@pytest.fixture
def frozen_wrongly() -> tuple[nn.Module, Report]:
    """SN002 on both norms, at "1" and "4"."""
    net = conv_net(momentum=0)
    report = check(net, select="SN002")
    assert [finding.paths for finding in report.findings] == [("1", "4")]
    return net, report


@pytest.mark.parametrize("rule", ["SN002", "SN0", "zero-momentum-freeze"])
@pytest.mark.parametrize("pattern", ["*", "[14]"])
def test_a_finding_that_is_accepted_at_all_its_layers_is_gone(frozen_wrongly, rule, pattern):
    _, report = frozen_wrongly
    left = ignoring(report, [Ignore(pattern, ("SN101", rule), "on purpose")], BY)
    assert left.findings == ()
    (hidden,) = left.suppressed
    assert (hidden.code, hidden.paths, hidden.whole) == ("SN002", ("1", "4"), True)
    assert (hidden.by, hidden.reason) == (BY, "on purpose")
    left.raise_for("info")


def test_a_finding_that_is_accepted_at_one_layer_is_about_the_others(frozen_wrongly):
    _, report = frozen_wrongly
    left = ignoring(report, [Ignore("1", ("SN002",))], BY)
    (finding,) = left.findings
    assert finding.paths == ("4",)
    assert finding.message == report.findings[0].message
    assert "of these layers 1 are suppressed by pyproject.toml: 1" in finding.note
    assert [(hidden.paths, hidden.whole) for hidden in left.suppressed] == [(("1",), False)]


def test_the_fix_leaves_accepted_layers_alone():
    net = conv_net(momentum=0.99)
    left = ignoring(check(net, select="SN108"), [Ignore("1", ("SN108",))], BY)
    left.fix(unsafe=True)
    assert (net[1].momentum, net[4].momentum) == (0.99, 0.01)


def test_a_fix_of_accepted_layers_only_is_not_offered():
    report = check(conv_net(momentum=0.99), select="SN108")
    (finding,) = report.findings
    assert finding.fix is not None
    fixes_one = replace(finding, fix=replace(finding.fix, paths=("1",)))
    left = ignoring(replace(report, findings=(fixes_one,)), [Ignore("1", ("SN108",))], BY)
    assert left.findings[0].fix is None


def test_reasons_are_kept_apart_and_the_first_pattern_decides(frozen_wrongly):
    _, report = frozen_wrongly
    ignores = [Ignore("1", ("SN002",), "old"), Ignore("*", ("SN002",), "all")]
    left = ignoring(report, ignores, BY)
    assert [(h.paths, h.reason) for h in left.suppressed] == [(("1",), "old"), (("4",), "all")]
    assert all(hidden.whole for hidden in left.suppressed)


@pytest.mark.parametrize(
    "ignore",
    [Ignore("1", ("SN105",)), Ignore("2", ("SN002",)), Ignore("1.deeper", ("SN002",))],
    ids=repr,
)
def test_other_rules_and_other_layers_are_reported(frozen_wrongly, ignore):
    _, report = frozen_wrongly
    assert ignoring(report, [ignore], BY) is report


def test_a_subtree_is_named_as_in_a_selector():
    inner = nn.Sequential(nn.BatchNorm1d(4, momentum=0))
    net = nn.Sequential(nn.BatchNorm1d(4, momentum=0), nn.Sequential(inner))
    left = ignoring(check(net, select="SN002"), [Ignore("1.*", ("SN002",))], BY)
    assert left.findings[0].paths == ("0",)


def test_a_finding_about_no_layer_is_accepted_by_the_star():
    report = check(conv_net(), select="SN002")
    finding = Finding("SN501", "diverged-ranks", "error", (), "ranks differ")
    with_it = replace(report, findings=(finding,))
    assert ignoring(with_it, [Ignore("backbone", ("SN501",))], BY) is with_it
    assert ignoring(with_it, [Ignore("*", ("SN501",))], BY).findings == ()


def test_an_unknown_rule_is_an_error(frozen_wrongly):
    with pytest.raises(RuleError, match="no rule is called 'shared-layr'"):
        ignoring(frozen_wrongly[1], [Ignore("*", ("shared-layr",))], BY)


def test_the_verdict_is_drawn_from_the_rest():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.bn(self.conv(5 + 3 * self.bn(x).relu()))

    torch.manual_seed(0)
    report = check(estimated(Shared()), data().split(16), select="SN201")
    assert report.verdict is not None
    assert report.verdict.choice == "repair"
    left = ignoring(report, [Ignore("bn", ("SN201",))], BY)
    assert left.verdict is not None
    assert left.verdict.choice != "repair"


def test_the_summary_counts_and_verbose_names(frozen_wrongly):
    _, report = frozen_wrongly
    whole = ignoring(report, [Ignore("*", ("SN002",), "a reason")], BY)
    assert "nothing found\n1 finding suppressed by pyproject.toml" in str(whole)
    assert "suppressed by pyproject.toml: SN002 on 1, 4 (a reason)" in whole.to_text(verbose=True)
    part = ignoring(report, [Ignore("1", ("SN002",))], BY)
    assert "finding suppressed" not in str(part)
