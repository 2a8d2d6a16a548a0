"""assert_healthy: fails at its severity, with the report, and never without having looked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm.errors import BatchError, FindingsError, RuleError
from stillnorm.testing import assert_healthy
from support.fingerprint import Fingerprint


def test_a_healthy_model_passes_with_its_report() -> None:
    net = estimated(conv_net()).eval()
    before = Fingerprint(net)
    report = assert_healthy(net, batches())
    assert found(report) == {}
    assert report.data.samples == 64
    assert before.differences(Fingerprint(net)) == []


def test_an_error_fails_with_the_report() -> None:
    net = estimated(conv_net())
    net[1].running_mean += 3
    with pytest.raises(FindingsError) as raised:
        assert_healthy(net, batches())
    assert isinstance(raised.value, AssertionError)
    text = str(raised.value)
    assert text.startswith("1 finding of severity error or worse\n\nSequential: 2 BatchNorm2d")
    assert "error[SN105] mismatched-statistics" in text
    assert "recalibrated" in text


def test_the_severity_says_what_fails() -> None:
    net = estimated(conv_net(momentum=0.99))
    assert found(assert_healthy(net)) == {"SN108": ("1", "4")}
    for severity in ("warning", "info"):
        with pytest.raises(FindingsError, match="SN108"):
            assert_healthy(net, severity=severity)


def test_everything_else_is_checks_own() -> None:
    net = estimated(conv_net()).train()

    def predict(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            return model(batch)

    assert_healthy(net, data(16))
    with pytest.raises(FindingsError, match="SN006"):
        assert_healthy(net, data(16), predict=predict)
    assert_healthy(net, data(16), predict=predict, ignore="SN006")
    with pytest.raises(RuleError):
        assert_healthy(net, select="SN999")
    with pytest.raises(BatchError):
        assert_healthy(net, score=lambda out, batch: 0.0)


def test_what_looked_at_nothing_proves_nothing() -> None:
    with pytest.raises(FindingsError, match="no rule ran, so nothing is proved: needs batches"):
        assert_healthy(conv_net(), select="SN105")
    with pytest.raises(FindingsError, match="no rule ran"):
        assert_healthy(conv_net(), ignore="SN")
