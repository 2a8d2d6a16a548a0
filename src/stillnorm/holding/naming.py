"""Names of classes that are made at run time, by which pickle finds them again.

pickle looks a class up as an attribute of its module and splits names at dots: the name of the base
is written into the made class's own, and the module's `__getattr__` reads it back.
"""

from __future__ import annotations

import importlib
from typing import Any


def mangled(prefix: str, base: type) -> str:
    """Name a class made for `base`.

    Example:
        >>> from torch import nn
        >>> mangled("Held", nn.BatchNorm2d)
        'HeldBatchNorm2d@torch/nn/modules/batchnorm'
    """
    return f"{prefix}{base.__qualname__}@{base.__module__}".replace(".", "/")


def base_of(prefix: str, name: str) -> Any:
    """Return the class for which a class of that name was made; None for any other name.

    Example:
        >>> base_of("Held", "HeldBatchNorm2d@torch/nn/modules/batchnorm")
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    qualname, at, module = name.removeprefix(prefix).replace("/", ".").partition("@")
    if not (name.startswith(prefix) and at):
        return None
    base = importlib.import_module(module)
    for part in qualname.split("."):
        base = getattr(base, part)
    return base
