"""timm's architectures, healthy: nothing is found in them."""

from __future__ import annotations

import pytest

from diagnosis.healthy.silent import assert_silent, names


@pytest.mark.parametrize("name", names("timm", 1, 2))
def test_silent(name: str) -> None:
    assert_silent(name)
