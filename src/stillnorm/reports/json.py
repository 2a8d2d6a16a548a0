"""The JSON writer: result objects as plain data."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Mapping, Sequence, Set
from pathlib import PurePath

import torch

Jsonable = None | bool | int | float | str | list["Jsonable"] | dict[str, "Jsonable"]


def to_jsonable(obj: object) -> Jsonable:
    """Turn a result into what JSON knows.

    Dataclasses become objects with their public fields in order, tensors (nested) lists, sets
    sorted lists. NaN and infinities, which JSON lacks, become the strings ``"nan"``, ``"inf"``
    and ``"-inf"``.

    Raises:
        TypeError: There is something in it that is not data, a module for instance.

    Example:
        >>> to_jsonable({"variance": (0.5, float("nan")), "dtype": torch.float16})
        {'variance': [0.5, 'nan'], 'dtype': 'float16'}
    """
    if isinstance(obj, enum.Enum):
        return to_jsonable(obj.value)
    if obj is None or isinstance(obj, bool | int | str):
        return obj
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else str(obj)
    if isinstance(obj, torch.Tensor):
        return to_jsonable(obj.tolist())
    if isinstance(obj, torch.dtype):
        return str(obj).removeprefix("torch.")
    if isinstance(obj, torch.device | PurePath):
        return str(obj)
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        public = (f.name for f in dataclasses.fields(obj) if not f.name.startswith("_"))
        return {name: to_jsonable(getattr(obj, name)) for name in public}
    if isinstance(obj, Mapping):
        return {str(key): to_jsonable(value) for key, value in obj.items()}
    if isinstance(obj, Set):
        return [to_jsonable(item) for item in sorted(obj)]
    if isinstance(obj, Sequence):
        return [to_jsonable(item) for item in obj]
    raise TypeError(f"{type(obj).__name__} is not data that JSON can hold")


def dumps(obj: object) -> str:
    """Write a result as JSON, keys in the order of its fields.

    Example:
        >>> print(dumps({"paths": ("bn1",)}))
        {
          "paths": [
            "bn1"
          ]
        }
    """
    return json.dumps(to_jsonable(obj), indent=2, ensure_ascii=False, allow_nan=False)
