"""The networks of the threads, exactly as they were posted.

A post is text: it is shown as it stands, and compiled under the name of its thread, so that a
finding points at the line of the post (``thread_003.py:48``) as it would in the author's file.
Only the imports above each class are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Post:
    """The code of one post.

    Args:
        thread: The thread's number.
        source: The code.
    """

    thread: str
    source: str

    def make(self, name: str, *args: Any) -> nn.Module:
        """Build the network `name` of the post."""
        namespace: dict[str, Any] = {"__name__": f"thread_{self.thread}"}
        exec(compile(self.source, f"thread_{self.thread}.py", "exec"), namespace)
        net: nn.Module = namespace[name](*args)
        return net


def post(thread: str) -> Post:
    """Return the code that thread `thread` posted."""
    text = files("stillnorm.demo").joinpath("posts", f"thread_{thread}.txt").read_text("utf-8")
    return Post(thread, text)
