"""The whole demo: five chapters by drama, one table of ten numbers, one page."""

from __future__ import annotations

import importlib.util
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch

import stillnorm as sn
from stillnorm.demo import thread_000, thread_001, thread_002, thread_003, thread_004
from stillnorm.demo.chapter import Chapter
from stillnorm.demo.progress import bars
from stillnorm.errors import StillnormError
from stillnorm.reports import Block, Document, Heading, Line, Table
from stillnorm.reports.json import dumps
from stillnorm.reports.numbers import number, percent

# Module: package; the extra `demo` installs them.
NEEDED = {"numpy": "numpy", "sklearn": "scikit-learn", "PIL": "pillow", "onnx": "onnx"}

THREADS = 1  # of torch: another number rounds otherwise and trains another network

PLAYS: tuple[Callable[..., Chapter], ...] = (
    thread_003.play,
    thread_000.play,
    thread_002.play,
    thread_004.play,
    thread_001.play,
)


@dataclass(frozen=True, eq=False)
class Demo:
    """What the demo measured.

    Args:
        chapters: The chapters, in order.
        seed: Of everything random.
        seconds: How long it took.
    """

    chapters: tuple[Chapter, ...]
    seed: int
    seconds: float

    @cached_property
    def numbers(self) -> Mapping[str, Mapping[str, float]]:
        """The measured numbers by thread and name, scores as fractions."""
        return {chapter.thread: chapter.numbers() for chapter in self.chapters}

    def summary(self) -> Document:
        """Return the table of ten numbers."""
        return Document("", (Heading("Ten numbers"), self._table()))

    def _table(self) -> Table:
        n = self.numbers
        shared, momentum, gradients = n["003"], n["000"], n["002"]
        exporter, conventions = n["004"], n["001"]
        rows = (
            (
                "003 accuracy in eval",
                percent(shared["eval"]),
                percent(shared["one_norm_per_call"]),
                "sn.split_shared",
            ),
            (
                "000 mean IoU in eval",
                percent(momentum["eval"]),
                percent(momentum["recalibrated"]),
                "sn.recalibrate",
            ),
            (
                "002 running_mean moved",
                number(gradients["moved_affine_false"]),
                number(gradients["moved_held"]),
                "sn.freeze",
            ),
            (
                "004 output moved",
                number(exporter["moved"]),
                number(exporter["moved_held"]),
                "sn.freeze",
            ),
            (
                "001 accuracy in eval",
                percent(conventions["keras_momentum"]),
                percent(conventions["torch_momentum"]),
                "momentum 0.01",
            ),
        )
        return Table(("thread", "as posted", "repaired", "by"), rows, "lrrl", indent=2)

    def page(self) -> Document:
        """Return the page: the table, then every chapter with code, plots and findings."""
        blocks: list[Block] = [
            Line(
                "Five discussions in which capable people lost days to one small layer, replayed "
                "on real data: their own code, what happens, and what repairs it. Every number on "
                "this page was measured in this run."
            ),
            self._table(),
        ]
        for i, chapter in enumerate(self.chapters, start=1):
            blocks += [Heading(f"{i}  {chapter.title}"), *chapter.page()]
        return Document(
            "BatchNorm that holds still", (*blocks, Heading("This run"), self._origin())
        )

    def _origin(self) -> Line:
        return Line(
            f"stillnorm {sn.__version__}, torch {torch.__version__} on {platform.machine()}, "
            f"one thread, seed {self.seed}, {self.seconds:.0f} s. Digits and photographs "
            "from scikit-learn."
        )

    def to_json(self) -> str:
        """Return the numbers as JSON."""
        return dumps({"seed": self.seed, "seconds": self.seconds, "numbers": self.numbers})


def run(seed: int = 0, *, tell: Callable[[Document], None] | None = None) -> Demo:
    """Play the five chapters; progress goes to stderr.

    Args:
        seed: Of everything random.
        tell: Is given each chapter in brief as soon as it is over.

    Raises:
        StillnormError: A chapter's fault did not happen, or a package is missing.

    Cost:
        About two minutes on one core.
    """
    _require_packages()
    started = time.perf_counter()
    chapters: list[Chapter] = []
    with _as_at_home():
        for i, play in enumerate(PLAYS, start=1):
            with bars(f"chapter {i} of {len(PLAYS)}") as track:
                chapters.append(play(seed, track=track))
            if tell is not None:
                tell(chapters[-1].document(i))
    return Demo(tuple(chapters), seed, time.perf_counter() - started)


def _require_packages() -> None:
    """Raise at once what would otherwise end the third or fourth chapter."""
    missing = [NEEDED[name] for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise StillnormError(
            f"the demo needs {', '.join(missing)}", help="pip install 'stillnorm[demo]'"
        )


@contextmanager
def _as_at_home() -> Iterator[None]:
    """Use the demo's number of threads, and leave that and the random state as found."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=()):
        torch.set_num_threads(THREADS)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
