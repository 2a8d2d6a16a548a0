"""What `check` is given: functions that cannot be called, and scores that are no numbers."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import batches, conv_net, data, estimated
from stillnorm import check
from stillnorm.errors import BatchError, CallError, StillnormError
from support.fingerprint import Fingerprint


@pytest.mark.parametrize("name", ["score", "predict", "train_step"])
class TestFunctions:
    def test_that_are_none(self, name: str) -> None:
        with pytest.raises(CallError, match=f"{name}= is a str, not a function") as raised:
            check(conv_net(), data(4), **{name: "acc"})
        assert raised.value.help.startswith(f"def {name}(")
        assert isinstance(raised.value, StillnormError)

    @pytest.mark.parametrize(
        "function", [lambda: 0, lambda x: 0, lambda a, b, c, d: 0, lambda a, *, b: 0]
    )
    def test_of_other_arguments(self, name: str, function: object) -> None:
        with pytest.raises(CallError, match=rf"{name}= takes \(.*\) and is called with \("):
            check(conv_net(), data(4), **{name: function})

    def test_that_take_anything(self, name: str) -> None:
        class Callable:
            def __call__(self, a: object, b: object, c: object = None) -> float:
                return 0.0

        for function in (lambda *args: 0.0, lambda a, b, c=1: 0.0, Callable(), max):
            check(conv_net(), data(4), select="SN105", **{name: function if name != "score" else f})

    def test_without_batches(self, name: str) -> None:
        with pytest.raises(BatchError, match=f"{name}= needs batches"):
            check(conv_net(), **{name: lambda a, b: 0.0})


def f(output: object, batch: object) -> float:
    return 0.0


def test_a_step_may_take_the_optimizer() -> None:
    check(conv_net(), data(4), train_step=lambda model, batch, optimizer: None, select="SN105")


class TestScore:
    def scored(self, score: object, net: nn.Module | None = None) -> float:
        report = check(net or estimated(conv_net()), batches(), score=score)
        assert report.head is not None
        str(report), report.to_json()
        return report.head.eval

    @pytest.mark.parametrize(
        "value",
        [0.25, torch.tensor(0.25), torch.tensor([[0.25]]), np.float32(0.25), np.array([0.25]),
         Decimal("0.25"), torch.tensor(0.25, requires_grad=True)],
    )  # fmt: skip
    def test_is_any_number(self, value: object) -> None:
        assert self.scored(lambda out, batch: value) == 0.25

    @pytest.mark.parametrize(
        ("value", "what"),
        [
            (torch.zeros(16), r"a Tensor \(16,\)"),
            (torch.zeros(0), r"a Tensor \(0,\)"),
            (torch.tensor(1j), r"a Tensor \(\)"),
            (np.zeros(16), "a ndarray"),
            ("0.5", "a str"),
            (None, "None"),
            ({"acc": 0.5}, "a dict"),
            ((0.5,), "a tuple"),
        ],
    )
    def test_is_nothing_else(self, value: object, what: str) -> None:
        net = estimated(conv_net())
        before = Fingerprint(net)
        with pytest.raises(CallError, match=f"score returned {what}, not a number") as raised:
            self.scored(lambda out, batch: value, net)
        assert "one number" in raised.value.help
        assert before.differences(Fingerprint(net)) == []

    def test_is_not_nan_of_an_output_that_is_a_number(self) -> None:
        with pytest.raises(CallError, match="score returned NaN for an output without NaN"):
            self.scored(lambda out, batch: math.nan)

    def test_may_be_nan_where_the_model_is(self) -> None:
        """The finding is what the user came for, so the score must not stand in its way."""
        net = estimated(conv_net())
        net[1].running_var[0] = math.nan

        def minus_loss(output: Tensor, batch: Tensor) -> Tensor:
            return -output.square().mean()

        assert math.isnan(self.scored(minus_loss, net))
        report = check(net, batches(), score=minus_loss)
        assert "SN102" in {finding.code for finding in report.findings}

    @pytest.mark.parametrize("value", [math.inf, -math.inf])
    def test_may_be_infinite(self, value: float) -> None:
        assert self.scored(lambda out, batch: value) == value
