"""The same on Keras' JAX backend, which a process chooses once: the tests run again in another."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_round_trips_on_jax() -> None:
    files = [str(HERE / name) for name in ("test_round_trip.py", "test_all_or_nothing.py")]
    chosen = "from_keras_and_back or resnet50_there or goes_on_alike or memory or comparing"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *files]
    environment = os.environ | {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout or "[100%]" in done.stdout
    said = subprocess.run(
        [sys.executable, "-c", "import keras; print(keras.backend.backend())"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert said.stdout.strip() == "jax"
