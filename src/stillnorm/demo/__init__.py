"""Five forum threads replayed on real data: what happened, and what repairs it.

Each chapter is one file, ``thread_003.py``: `play` trains, breaks, checks and repairs, and returns
the numbers; the result tells them in brief for the terminal and at length for the page.
"""

from stillnorm.demo.replay import Demo as Demo
from stillnorm.demo.replay import run as run
