"""Numbers promise: few digits, never a wrong one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillnorm.reports.numbers import count, number, percent, short, size, span

reals = st.floats(-1e12, 1e12).filter(lambda x: x == 0 or abs(x) > 1e-30)


@given(reals)
def test_a_number_is_right_to_two_figures(x):
    assert float(number(x)) == pytest.approx(x, rel=0.05)
    assert float(short(x)) == pytest.approx(x, rel=0.05)


@given(st.floats(0.1, 999))
def test_a_column_of_ordinary_numbers_has_two_decimals(x):
    assert number(x)[-3] == "."


@given(reals)
def test_numbers_are_short(x):
    assert len(number(x)) <= 8
    assert len(short(x)) <= 8


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(17.271), "17.27"),
        (number(-0.00123), "-0.0012"),
        (number(0.95, digits=3), "0.950"),
        (number(float("inf")), "inf"),
        (span(0.0912, 4.13), "0.091 .. 4.1"),
        (span(1, 1), "1 .. 1"),
        (span(-0.0, 25024), "0 .. 25024"),
        (percent(1), "100.0 %"),
        (count(1, "batch"), "1 batch"),
        (count(2, "batch"), "2 batches"),
        (count(0, "norm layer"), "0 norm layers"),
        (size(1024), "1.0 KiB"),
        (size(3 * 2**50), "3072.0 TiB"),
    ],
)
def test_written(written, expected):
    assert written == expected
