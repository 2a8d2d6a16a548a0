"""The chapters, each played once at a fraction of the demo's size."""

from __future__ import annotations

import pytest

from stillnorm.demo import thread_000, thread_001, thread_002, thread_003, thread_004


@pytest.fixture(scope="session")
def shared() -> thread_003.SharedNorm:
    return thread_003.play(epochs=1)


@pytest.fixture(scope="session")
def momentum() -> thread_000.ZeroMomentum:
    return thread_000.play(pretraining=60, steps=60)


@pytest.fixture(scope="session")
def gradients() -> thread_002.Gradients:
    return thread_002.play(side=20)


@pytest.fixture(scope="session")
def exporter() -> thread_004.Exporter:
    return thread_004.play()


@pytest.fixture(scope="session")
def conventions() -> thread_001.Conventions:
    return thread_001.play()
