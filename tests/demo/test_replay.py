"""The whole demo: told chapter by chapter, the same numbers everywhere, nothing left behind."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch

from stillnorm.demo import Demo, replay, run
from stillnorm.demo.chapter import Chapter
from stillnorm.errors import StillnormError
from stillnorm.reports import Block, Line, html, text


class Told(Chapter):
    """Stands for a chapter, which takes seconds and has tests of its own."""

    def __init__(self, thread: str, **numbers: float) -> None:
        self.thread, self.measured = thread, numbers

    title = "What happened"

    def brief(self) -> tuple[Block, ...]:
        return (Line(f"thread {self.thread} in brief"),)

    def page(self) -> tuple[Block, ...]:
        return (Line(f"thread {self.thread} at length"),)

    def numbers(self) -> Mapping[str, float]:
        return self.measured


CHAPTERS = (
    Told("003", eval=0.111, one_norm_per_call=0.222),
    Told("000", eval=0.333, recalibrated=0.444),
    Told("002", moved_affine_false=5.55, moved_held=0.66),
    Told("004", moved=7.77, moved_held=0.88),
    Told("001", keras_momentum=0.999, torch_momentum=0.123),
)
TEN = ["11.1 %", "22.2 %", "33.3 %", "44.4 %", "5.55", "0.66", "7.77", "0.88", "99.9 %", "12.3 %"]


@pytest.fixture
def demo() -> Demo:
    return Demo(CHAPTERS, seed=3, seconds=1.0)


def test_the_table_shows_ten_numbers_as_measured(demo) -> None:
    rows = demo.summary().blocks[-1].rows
    assert [cell for row in rows for cell in row[1:3]] == TEN
    assert [row[0][:3] for row in rows] == [chapter.thread for chapter in CHAPTERS]
    assert all(cell in text.write(demo.summary()) for cell in TEN)


def test_the_page_is_one_file_with_every_chapter_at_length(demo) -> None:
    page = html.write(demo.page())
    assert all(f"thread {chapter.thread} at length" in page for chapter in CHAPTERS)
    assert all(cell.replace(" %", "\N{NO-BREAK SPACE}%") in page for cell in TEN)
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)


def test_the_numbers_as_json(demo) -> None:
    told = json.loads(demo.to_json())
    assert told["numbers"] == {chapter.thread: chapter.measured for chapter in CHAPTERS}
    assert (told["seed"], told["seconds"]) == (3, 1.0)


def test_each_chapter_is_told_when_it_is_over(monkeypatch) -> None:
    told: list[str] = []

    def player(i: int):
        def play(seed, *, track):
            assert (seed, len(told)) == (5, i)
            assert list(track([1, 2], "work")) == [1, 2]
            return CHAPTERS[i]

        return play

    monkeypatch.setattr(replay, "PLAYS", tuple(map(player, range(5))))
    result = run(5, tell=lambda document: told.append(document.title))
    assert told == [f"{i}  What happened" for i in range(1, 6)]
    assert (result.chapters, result.seed) == (CHAPTERS, 5)


def test_threads_and_random_state_are_as_found_also_when_a_chapter_fails(monkeypatch) -> None:
    def play(seed, *, track):
        assert torch.get_num_threads() == replay.THREADS
        torch.rand(1)
        raise StillnormError("thread 003 did not happen")

    monkeypatch.setattr(replay, "PLAYS", (play,))
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    torch.set_num_threads(2)
    try:
        with pytest.raises(StillnormError, match="did not happen"):
            run()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.get_rng_state(), state)


def test_missing_packages_are_named_before_the_work_begins(monkeypatch) -> None:
    monkeypatch.setattr(replay, "PLAYS", (lambda *_, **__: pytest.fail("the work began"),))
    for name in ("sklearn", "onnx"):
        monkeypatch.setitem(replay.NEEDED, f"no_such_{name}", name)
    with pytest.raises(StillnormError, match=r"the demo needs sklearn, onnx\n.*stillnorm\[demo\]"):
        run()


def test_the_demo_imports_without_the_packages_of_its_extra() -> None:
    """So that the error above is what a plain installation shows."""
    code = (
        "import sys\n"
        "for name in ('numpy', 'sklearn', 'PIL', 'onnx'): sys.modules[name] = None\n"
        "import stillnorm.demo"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
