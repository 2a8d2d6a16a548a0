"""The five chapters in order of drama, and the ten numbers to remember."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from stillnorm.demo import thread_000, thread_001, thread_002, thread_003, thread_004
from stillnorm.demo.chapter import Chapter
from stillnorm.demo.progress import bars
from stillnorm.reports import Block, Document, Heading, Line, Table, json
from stillnorm.reports.numbers import number, percent

_CHAPTERS = (thread_003, thread_000, thread_002, thread_004, thread_001)

# thread, number, what it is, whether it is a score
_REMEMBER = (
    ("003", "train_mode", "one norm at several places: train-mode accuracy", True),
    ("003", "eval", "    the same weights in eval()", True),
    ("003", "one_norm_per_call", "    one norm per call, no training", True),
    ("000", "train_mode", "momentum 0: train-mode mean IoU", True),
    ("000", "eval", "    the same weights in eval()", True),
    ("000", "recalibrated", "    recalibrated, no training", True),
    ("000", "held", "    next time: freeze, a tenth of the learning rate", True),
    ("002", "affine_false_moved", "affine=False: running mean moved in one forward by", False),
    ("004", "exported", "ONNX export (dynamo=False): output moved by", False),
    ("001", "keras", "momentum 0.99 copied from Keras: eval accuracy", True),
)


@dataclass(frozen=True, eq=False)
class Demo:
    """What was measured.

    Args:
        chapters: One result per thread, in order.
        seconds: The time it took.
        seed: Of everything random.
    """

    chapters: tuple[Chapter, ...]
    seconds: float
    seed: int

    def numbers(self) -> dict[str, dict[str, float]]:
        """Return the measured numbers by thread and name, scores as fractions."""
        return {chapter.thread: dict(chapter.numbers()) for chapter in self.chapters}

    def to_json(self) -> str:
        """Return the numbers as JSON."""
        return json.dumps(self.numbers())

    def document(self) -> Document:
        """Return it for the terminal."""
        blocks: list[Block] = []
        for place, chapter in enumerate(self.chapters, start=1):
            told = chapter.document(place)
            blocks += [Heading(told.title), *told.blocks, Line("")]
        return Document("", (*blocks, Heading("Ten numbers"), self._remember(), self._made()))

    def page(self) -> Document:
        """Return it as a page, with the plots."""
        blocks: list[Block] = [
            Line(
                "Five discussions in which capable people lose days to one small layer, replayed "
                "with their own code where they posted it, on real data, and solved. Every number "
                "was measured in the run that wrote this page."
            ),
            self._remember(),
            self._made(),
        ]
        for place, chapter in enumerate(self.chapters, start=1):
            blocks += [Heading(f"{place}  {chapter.title}"), *chapter.page()]
        return Document("BatchNorm that holds still: five threads, measured", tuple(blocks))

    def _remember(self) -> Table:
        numbers = self.numbers()
        rows = tuple(
            (what, percent(value) if is_score else number(value), f"thread {thread}")
            for thread, name, what, is_score in _REMEMBER
            for value in (numbers[thread][name],)
        )
        return Table((), rows, "lrl", indent=2, gap=3)

    def _made(self) -> Line:
        return Line(
            f"measured in {self.seconds:.0f} s with seed {self.seed}, torch {torch.__version__}, "
            f"{torch.get_num_threads()} threads, on scikit-learn's digits and photographs"
        )


def run(seed: int = 0) -> Demo:
    """Replay the five threads.

    Args:
        seed: Of everything random.

    Raises:
        StillnormError: A thread's fault did not happen, or a package of the demo is missing.
    """
    begun = time.perf_counter()
    chapters = []
    for place, module in enumerate(_CHAPTERS, start=1):
        with bars(f"chapter {place} of {len(_CHAPTERS)}") as track:
            chapters.append(module.play(seed, track=track))
    return Demo(tuple(chapters), time.perf_counter() - begun, seed)
