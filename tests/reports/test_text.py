"""The text writer promises: what SCREENS shows, nothing lost, nothing wider than the page."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reports.samples import CHECK, EVERY_BLOCK, documents, tables
from stillnorm.reports import Bar, Bars, Diagnostic, Document, Line, Quote, Span, Table, text
from stillnorm.reports.document import plain

ANSI = re.compile(r"\x1b\[[0-9;]*m")


def lines(*blocks: object, width: int = 100) -> list[str]:
    return text.write(Document("", blocks), width=width).splitlines()


def test_the_screen_of_check():
    """The whole screen, character by character."""
    assert (
        text.write(CHECK)
        == """\
Keras_Cifar2: 7 BatchNorm2d, 8 of 24 batches of 64, cpu, 1.9 s

  eval (running statistics)   21.4 %   what you ship
  batch statistics            98.4 %   what you trained
  recalibrated                26.4 %   so stale statistics are not the cause

error[SN201] shared-layer: bn_6 normalises two different inputs with one set of statistics
  --> bn_6  BatchNorm2d(32)   net.py:31, net.py:33
   |            mean   variance
   |  call 1    0.61       0.81
   |  call 2    3.04      17.27
   |  running   1.80       9.02   fits neither
   = also: bn_2 (3 calls, net.py:39, 41, 43), bn_7 (2 calls, net.py:35, 37)
   = help: write one norm per call, or `sn.split_shared(model, batches)`
   = fix: unsafe, needs data; measured: eval 21.4 % -> 98.4 %

warning[SN203] normalized-output: the class scores are the output of a norm
  --> bn_5  BatchNorm2d(10)   net.py:45
   = help: remove bn_5

1 error, 1 warning, 2 notes (--verbose)
verdict: repair before anything else"""
    )


def test_colour_is_on_the_severity_word_and_the_marked_number_only():
    coloured = re.findall(r"\x1b\[([0-9;]+)m(.*?)\x1b\[0m", text.write(CHECK, color=True))
    assert coloured == [
        ("1;31", "21.4 %"),
        ("1;31", "error"),
        ("1;31", "17.27"),
        ("1;33", "warning"),
        ("1", "repair"),
    ]


@pytest.mark.parametrize("width", [60, 100])
def test_without_colour_there_is_no_escape_and_the_words_are_the_same(width):
    without = text.write(EVERY_BLOCK, width=width)
    with_colour = text.write(EVERY_BLOCK, width=width, color=True)
    assert "\x1b" not in without
    assert "\x1b" in with_colour
    assert ANSI.sub("", with_colour) == without


def test_every_block_is_written():
    written = text.write(EVERY_BLOCK)
    for piece in (
        "Thread 003",
        '"model.eval() only 10 %"',
        "    an indented line",
        "           range activation  mean    sd",
        "  with              -2 .. 2  0.00  0.81",
        "  without            4 .. 8  6.00  0.00",
        "  nothing         no values     -     -",
        "    sn.is_frozen(model)",
    ):
        assert piece in written


def test_a_source_stands_at_the_right_edge():
    assert lines(Quote("short", "thread 003"), width=40) == ['"short"' + " " * 23 + "thread 003"]


def test_a_source_that_does_not_fit_beside_stands_below():
    assert lines(Quote("a" * 35, "thread 003"), width=40)[1] == " " * 30 + "thread 003"


def test_numbers_stand_under_each_other():
    table = Table(("path", "variance"), (("a", "0.81"), ("bb", "17.27")), "lr")
    assert lines(table) == ["path  variance", "a         0.81", "bb       17.27"]


def test_a_long_path_is_shortened_in_the_middle():
    path = "backbone.body.layer4.2.downsample.1.some.more.blocks.that.never.end.bn1"
    (line,) = lines(Table((), ((path, "running", "0.09 .. 4.1"),), "llr"), width=60)
    assert len(line) <= 60
    head, tail = line.split()[0].split("…")
    assert path.startswith(head)
    assert path.endswith(tail)
    assert 6 <= len(head) < len(tail)
    assert ".never.end.bn1  running  0.09 .. 4.1" in line


def test_prose_gives_way_before_words_in_other_columns():
    words = "his network, unchanged, on digits"
    row = (words, "train-mode 96.9 %", "eval 11.7 %", "one set of statistics cannot fit two inputs")
    assert lines(Table((), (row,), "llll"))[0].startswith(words)


def test_prose_in_the_last_column_wraps_under_itself():
    table = Table((), (("bn1", "the batch moves the statistics " * 3),), "ll")
    wrapped = lines(table, width=40)
    assert len(wrapped) > 1
    assert all(re.match(r"(bn1|   )  \S", line) and len(line) <= 40 for line in wrapped)


def test_a_note_continues_under_its_text():
    note = ("help", "word " * 30)
    wrapped = lines(Diagnostic("info", "SN114", "unreached-layer", "m", notes=(note,)), width=50)
    assert wrapped[1].startswith("   = help: word")
    assert all(line.startswith(" " * 11 + "word") for line in wrapped[2:])


def test_a_percent_sign_stays_with_its_number():
    for width in range(12, 40):
        assert all(
            not line.lstrip().startswith("%")
            for line in lines(Line("eval 21.4 % and 98.4 % and 26.4 %"), width=width)
        )


def test_styles_of_a_wrapped_line_stay_where_they_were():
    line = Line(("word " * 8, Span("worst", "error"), " word"))
    written = text.write(Document("", (line,)), width=30, color=True)
    assert "\x1b[1;31mworst\x1b[0m" in written


def test_bars_take_the_unit_of_the_score():
    assert lines(Bars("mean IoU", (Bar("eval", 0.312), Bar("batch", float("nan")))))[1:] == [
        "  eval    0.31",
        "  batch    nan",
    ]


def test_blank_lines_are_never_doubled_and_findings_are_apart():
    finding = Diagnostic("info", "SN114", "unreached-layer", "m")
    assert lines(
        Line(""), Line("a"), Line(""), Line(""), finding, finding, Line("b"), Line("")
    ) == [
        "a",
        "",
        "info[SN114] unreached-layer: m",
        "",
        "info[SN114] unreached-layer: m",
        "",
        "b",
    ]


@settings(max_examples=150)
@given(documents, st.integers(40, 100))
def test_no_prose_is_lost_and_no_line_is_too_wide(document, width):
    """Whatever the document: words in their order, no blank edges, no trailing spaces."""
    written = text.write(document, width=width)
    for block in document.blocks:
        if isinstance(block, Line):
            assert " ".join(plain(block.text).split()) in " ".join(written.split())
    if not any(isinstance(b, Table | Diagnostic) for b in document.blocks):
        assert all(len(line) <= width for line in written.splitlines())
    assert all(line == line.rstrip() for line in written.splitlines())
    assert "\n\n\n" not in written
    assert written == written.strip("\n")


def test_a_table_with_too_many_columns_goes_on_below():
    header = ("path", *(f"number{i}" for i in range(8)))
    row = ("backbone.layer1", *(f"{i}.25" for i in range(8)))
    assert lines(Table(header, (row,), "l" + "r" * 8), width=60) == [
        "path             number0  number1  number2  number3  number4",
        "backbone.layer1     0.25     1.25     2.25     3.25     4.25",
        "",
        "path             number5  number6  number7",
        "backbone.layer1     5.25     6.25     7.25",
    ]


@settings(max_examples=300)
@given(tables(), st.integers(30, 100))
def test_a_table_keeps_every_number_and_fits(table, width):
    """Whenever the first column, narrowed, and any other fit beside each other."""
    written = text.write(Document("", (table,)), width=width)
    columns = list(zip(*(table.rows + ((table.header,) if table.header else ())), strict=True))
    narrowest = []
    for letter, column in zip(table.align, columns, strict=True):
        natural = max(len(plain(cell)) for cell in column)
        is_last = len(narrowest) == len(columns) - 1
        floor = max(24, width // 3) if is_last and natural > 24 else 12
        longest_word = max(len(word) for cell in column for word in plain(cell).split() or [""])
        narrowest.append(natural if letter == "r" else max(longest_word, min(natural, floor)))
        if letter == "r":
            assert all(plain(cell) in written for cell in column)
    if len(columns) == 1 or all(narrowest[0] + table.gap + n <= width for n in narrowest[1:]):
        assert all(len(line) <= width for line in written.splitlines())


@pytest.mark.parametrize("color", [False, True])
def test_control_characters_are_written_out(color):
    evil = "a\n::error::b\x1b[2J\x9b\r\x00"
    table = Table(("", evil), ((evil, evil),), "ll")
    blocks = (
        Line(evil),
        table,
        Quote(evil, evil),
        Diagnostic("error", "SN1", evil, evil, (evil,), table, (("help", evil),)),
    )
    written = ANSI.sub("", text.write(Document(evil, blocks), width=400, color=color))
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", written)
    assert not any(line.lstrip().startswith("::") for line in written.splitlines())
    assert r"a\n::error::b\x1b[2J\x9b\r\x00" in written
