"""Raising in the middle of an operation, to see that it leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest


class Interruption:
    """Makes the n-th call of a function or method raise, once it has done its work or before.

    Args:
        monkeypatch: Puts the function back.
        where: The module or class.
        name: The name there.
        nth: Which call.
        kind: What is raised.
        before: Before the work instead of after.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        where: Any,
        name: str,
        nth: int,
        kind: type[BaseException],
        *,
        before: bool = False,
    ) -> None:
        self.calls = 0
        real = getattr(where, name)

        def interrupted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == nth and before:
                raise kind("step")
            result = real(*args, **kwargs)
            if self.calls == nth:
                raise kind("step")
            return result

        monkeypatch.setattr(where, name, interrupted)
