"""Keras' own files, of which no code is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras

from stillnorm.errors import FileFormatError
from stillnorm.state.files import must_be_file


def load(path: Path) -> Any:
    """Read a model from a ``.keras`` file: JSON and tensors in a zip archive.

    Keras' safe mode refuses what would unpickle code, a `Lambda` layer for one; there is no way
    around it here.

    Raises:
        FileFormatError: It is missing, or no such file, or has code in it.
    """
    must_be_file(path)
    if path.suffix != ".keras":
        raise FileFormatError(
            f"{path.name} is no .keras file",
            help="in Keras 3: model.save('model.keras'); older formats can hold pickled code",
        )
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise FileFormatError(
            f"{path.name} cannot be loaded: {_first(error)}",
            help="with layers of your own, or Lambda: load it in Python, then "
            "sn.port.from_keras(keras_model, model)",
        ) from None


def _first(error: Exception) -> str:
    """Return the first sentence of Keras' many."""
    lines = str(error).strip().splitlines()
    return lines[0].partition(". ")[0][:200] if lines else type(error).__name__
