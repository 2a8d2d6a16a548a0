"""How much room the tapes of the sequential method have."""

from __future__ import annotations

import pytest

from stillnorm.calibration import sequential


@pytest.fixture(params=["kept", "run again", "kept in part"])
def room(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "run again":
        monkeypatch.setattr(sequential, "free_bytes", lambda device: 0)
    if request.param == "kept in part":
        monkeypatch.setattr(sequential, "free_bytes", lambda device: 60_000)
