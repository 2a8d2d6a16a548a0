"""Documents to write: one with every kind of block, and a strategy that makes any."""

from __future__ import annotations

from hypothesis import strategies as st

from stillnorm.reports import (
    Bar,
    Bars,
    Code,
    Diagnostic,
    Document,
    Heading,
    Histogram,
    Line,
    Quote,
    Series,
    Span,
    Table,
)

CHECK = Document(
    "Keras_Cifar2: 7 BatchNorm2d, 8 of 24 batches of 64, cpu, 1.9 s",
    (
        Bars(
            "",
            (
                Bar("eval (running statistics)", 21.4, "what you ship", "error"),
                Bar("batch statistics", 98.4, "what you trained"),
                Bar("recalibrated", 26.4, "so stale statistics are not the cause"),
            ),
            "%",
        ),
        Diagnostic(
            "error",
            "SN201",
            "shared-layer",
            "bn_6 normalises two different inputs with one set of statistics",
            ("bn_6  BatchNorm2d(32)   net.py:31, net.py:33",),
            Table(
                ("", "mean", "variance", ""),
                (
                    ("call 1", "0.61", "0.81", ""),
                    ("call 2", "3.04", Span("17.27", "error"), ""),
                    ("running", "1.80", "9.02", "fits neither"),
                ),
                "lrrl",
                gap=3,
            ),
            (
                ("also", "bn_2 (3 calls, net.py:39, 41, 43), bn_7 (2 calls, net.py:35, 37)"),
                ("help", "write one norm per call, or `sn.split_shared(model, batches)`"),
                ("fix", "unsafe, needs data; measured: eval 21.4 % -> 98.4 %"),
            ),
        ),
        Diagnostic(
            "warning",
            "SN203",
            "normalized-output",
            "the class scores are the output of a norm",
            ("bn_5  BatchNorm2d(10)   net.py:45",),
            notes=(("help", "remove bn_5"),),
        ),
        Line("1 error, 1 warning, 2 notes (--verbose)"),
        Line(("verdict: ", Span("repair", "strong"), " before anything else")),
    ),
)

EVERY_BLOCK = Document(
    "Every block <once> & again",
    (
        *CHECK.blocks,
        Heading("Thread 003"),
        Quote("model.eval() only 10 %", "thread 003, post 4"),
        Line("a line with `code`"),
        Line(""),
        Line("an indented line", indent=4),
        Heading("Inputs", level=3),
        Histogram(
            "inputs of layer 3",
            (
                Series("with", (-2.0, -1.0, 0.0, 1.0, 2.0), (1, 4, 4, 1)),
                Series("without", (0.0, 4.0, 8.0), (0, 5)),
                Series("nothing", (0.0, 1.0), (0,)),
            ),
            "activation",
        ),
        Code("sn.freeze(model)\n\nsn.is_frozen(model)"),
        Table(("path", "used"), (("layer1.*.bn1..3", "running"), ("head", "batch")), "ll"),
        Heading("Not checked"),
        Heading("More"),
    ),
)

words = st.text("abcdefg.<&`%1", min_size=1, max_size=12)
prose = st.lists(words, min_size=1, max_size=30).map(" ".join)
numbers = st.floats(0, 1e6).map("{:.2f}".format)


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Text columns and at most four number columns, with or without prose at the end."""
    align = draw(st.text("l", min_size=1, max_size=3)) + "r" * draw(st.integers(0, 4))
    kinds = [words if letter == "l" else numbers for letter in align]
    if draw(st.booleans()):
        align, kinds = align + "l", [*kinds, prose]
    rows = draw(st.lists(st.tuples(*kinds), min_size=1, max_size=5))
    header = draw(st.sampled_from([(), tuple("h" * (i + 1) for i in range(len(align)))]))
    return Table(header, tuple(rows), align)


diagnostics = st.builds(
    Diagnostic,
    st.sampled_from(["error", "warning", "info"]),
    st.just("SN201"),
    st.just("shared-layer"),
    prose,
    st.lists(prose, max_size=3).map(tuple),
    st.none() | tables(),
    st.lists(st.tuples(st.sampled_from(["note", "help", "fix"]), prose), max_size=3).map(tuple),
)
blocks = (
    st.builds(Line, prose | st.just(""), st.integers(0, 6))
    | st.builds(Heading, prose, st.integers(2, 3))
    | st.builds(Quote, prose, words)
    | diagnostics
    | tables()
)
documents = st.builds(Document, prose | st.just(""), st.lists(blocks, max_size=6).map(tuple))
