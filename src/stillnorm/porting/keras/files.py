"""Keras' own files, of which no code is run."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import keras
from keras.src.saving.serialization_lib import SafeModeScope

from stillnorm.errors import FileFormatError
from stillnorm.porting.keras.running import cause
from stillnorm.state.files import must_be_file

_DAMAGED = "it may be damaged or cut short: copy or save it again"
_OWN = (
    "with layers of your own, or Lambda: load it in Python, then sn.port.from_keras(keras_model, "
    f"model); if not, {_DAMAGED}"
)
_SAVE = "in Keras 3: model.save('model.keras'); older formats can hold pickled code"
_MOST = 100  # a file of weights is hardly smaller packed: what grows more is no model


def load(path: Path) -> Any:
    """Read a model from a ``.keras`` file: JSON and tensors in a zip archive.

    Keras' safe mode refuses what would unpickle code, a `Lambda` layer for one; there is no way
    around it here, whatever ``keras.config.enable_unsafe_deserialization`` has switched off.

    Raises:
        FileFormatError: It is missing, or no such file, or has code in it.
    """
    must_be_file(path)
    if path.suffix != ".keras":
        raise FileFormatError(f"{path.name} is no .keras file", help=_SAVE)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except Exception as error:  # zipfile's, of which a damaged archive raises many
        raise FileFormatError(
            f"{path.name} cannot be loaded: {cause(error)}", help=f"{_DAMAGED}; {_SAVE}"
        ) from None
    if unpacked > _MOST * path.stat().st_size:
        raise FileFormatError(
            f"{path.name} would be {unpacked / 2**20:.0f} MiB unpacked, over {_MOST} times its size"
        )
    try:
        with SafeModeScope(True):
            model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise FileFormatError(f"{path.name} cannot be loaded: {cause(error)}", help=_OWN) from None
    if not isinstance(model, keras.Model):
        raise FileFormatError(f"{path.name} holds a {type(model).__name__}, no model", help=_SAVE)
    return model
