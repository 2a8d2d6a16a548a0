"""transformers's architectures, healthy: nothing is found in them but what is true."""

from __future__ import annotations

import pytest

from diagnosis.healthy.silent import assert_silent, names


@pytest.mark.parametrize("name", names("transformers") + names("here"))
def test_silent(name: str) -> None:
    assert_silent(name)
