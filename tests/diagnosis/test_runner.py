"""`check`: which rules run, what happens to one that breaks, what order the findings have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, estimated, found
from stillnorm import check
from stillnorm.diagnosis import Finding
from stillnorm.diagnosis.codes import CODES
from stillnorm.diagnosis.rules.keras_momentum import KerasMomentum
from stillnorm.diagnosis.rules.shared_layer import SharedLayer
from stillnorm.errors import FindingsError, RuleError
from stillnorm.norms import find_norms
from support.zoo import torchvision


def ill() -> nn.Sequential:
    """Keras's momentum on both norms, a NaN in one, momentum 0 on the other."""
    net = estimated(conv_net(momentum=0.99))
    net[1].momentum = 0
    net[4].running_mean[0] = torch.nan
    return net


def test_errors_come_before_warnings_and_each_in_order_of_code() -> None:
    report = check(ill())
    assert [(f.code, f.severity) for f in report.findings] == [
        ("SN002", "error"),
        ("SN102", "error"),
        ("SN108", "warning"),
    ]


def test_select_and_ignore_choose_the_rules() -> None:
    assert found(check(ill(), select="SN1")).keys() == {"SN102", "SN108"}
    assert found(check(ill(), ignore=["SN1", "zero-momentum-freeze"])) == {}
    with pytest.raises(RuleError):
        check(ill(), select="SN999")


def test_rules_that_need_batches_are_listed_as_not_run_without_them() -> None:
    report = check(ill())
    forward = {c for c, rule in CODES.items() if rule.needs == ("forward",) and not rule.preview}
    assert {m.code for m in report.not_run if m.reason == "needs batches"} == forward
    assert (report.head, report.verdict, report.data) == (None, None, None)
    assert not forward & {missed.code for missed in check(ill(), batches()).not_run}


def test_a_rule_that_breaks_is_named_and_the_others_findings_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(self: KerasMomentum, evidence: object) -> Iterator[Finding]:
        raise ZeroDivisionError("by zero")
        yield

    monkeypatch.setattr(KerasMomentum, "find", broken)
    report = check(ill())
    assert [(c.code, c.error) for c in report.crashed] == [("SN108", "ZeroDivisionError: by zero")]
    assert [f.code for f in report.findings] == ["SN002", "SN102"]
    assert "internal: SN108 failed itself: ZeroDivisionError: by zero" in str(report)


def test_ctrl_c_in_a_rule_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: SharedLayer, evidence: object) -> Iterator[Finding]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(SharedLayer, "find", interrupted)
    with pytest.raises(KeyboardInterrupt):
        check(ill(), batches())


def test_a_model_without_norms_is_clean() -> None:
    report = check(nn.Linear(3, 2), torch.randn(4, 3), score=lambda out, batch: out.mean())
    assert report.findings == ()
    assert report.verdict is None
    assert str(report).startswith("Linear: no norm layers, 1 batch of 4, cpu")


def test_a_model_that_is_one_norm_has_the_root_as_its_path() -> None:
    report = check(nn.BatchNorm1d(4, momentum=0))
    assert report.findings[0].paths == ("",)
    assert "(root)" in str(report)


def test_wrapped_models_keep_the_users_paths() -> None:
    net = nn.DataParallel(estimated(conv_net(momentum=0.99)))
    assert found(check(net)) == {"SN108": ("1", "4")}


def test_a_compiled_model_is_checked_as_what_it_wraps() -> None:
    net = estimated(conv_net())
    net[1].running_mean += 3
    assert found(check(torch.compile(net, backend="eager"), batches())) == {"SN105": ("1",)}


def test_a_scripted_model_does_not_break_it() -> None:
    net = torch.jit.script(estimated(conv_net()).eval())
    report = check(net)
    assert report.crashed == ()


def test_lazy_and_meta_models_do_not_break_the_rules_of_the_tree() -> None:
    with torch.device("meta"):
        meta = torchvision.models.resnet18()
    for net in (nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d()), meta):
        report = check(net)
        assert report.crashed == ()
        assert len(report.layers) == len(find_norms(net))


def test_half_precision_models_are_measured() -> None:
    net = estimated(conv_net())
    net[4].running_mean += 3
    report = check(net.to(torch.bfloat16), [x.bfloat16() for x in batches()], select="SN105")
    assert found(report) == {"SN105": ("4",)}


def test_raise_for_raises_at_its_severity_and_not_below() -> None:
    report = check(conv_net(momentum=0.99))
    report.raise_for()
    with pytest.raises(FindingsError, match=r"1 finding .* SN108 keras-momentum"):
        report.raise_for("warning")
