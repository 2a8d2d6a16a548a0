"""Keras picks its backend when it is imported: torch, for the tests and for the examples in src."""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
