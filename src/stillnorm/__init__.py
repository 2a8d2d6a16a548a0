"""BatchNorm that holds still: see what every norm layer does, freeze it, repair its statistics.

    import stillnorm as sn

Public names are imported on first use (PEP 562), so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stillnorm import averages as averages
    from stillnorm import export as export
    from stillnorm import porting as port  # noqa: F401, ruff knows aliases of the same name only
    from stillnorm import repair as repair
    from stillnorm import testing as testing
    from stillnorm.calibration import recalibrate as recalibrate
    from stillnorm.diagnosis import check as check
    from stillnorm.diagnosis import inspect as inspect
    from stillnorm.errors import StillnormError as StillnormError
    from stillnorm.errors import StillnormWarning as StillnormWarning
    from stillnorm.export import export_onnx as export_onnx
    from stillnorm.folding import fold as fold
    from stillnorm.freezing import freeze as freeze
    from stillnorm.freezing import is_frozen as is_frozen
    from stillnorm.freezing import unfreeze as unfreeze
    from stillnorm.repair import replace as replace
    from stillnorm.repair import split_shared as split_shared
    from stillnorm.repair import track_statistics as track_statistics
    from stillnorm.state import Snapshot as Snapshot
    from stillnorm.state import eval_mode as eval_mode
    from stillnorm.state import no_updates as no_updates
    from stillnorm.state import preserved as preserved
    from stillnorm.state import snapshot as snapshot

__version__ = version("stillnorm")

_ROOM_OF = {
    "Snapshot": "state",
    "StillnormError": "errors",
    "StillnormWarning": "errors",
    "check": "diagnosis",
    "eval_mode": "state",
    "export_onnx": "export",
    "fold": "folding",
    "freeze": "freezing",
    "inspect": "diagnosis",
    "is_frozen": "freezing",
    "no_updates": "state",
    "preserved": "state",
    "recalibrate": "calibration",
    "replace": "repair",
    "split_shared": "repair",
    "track_statistics": "repair",
    "snapshot": "state",
    "unfreeze": "freezing",
}

# The rarer tools, which are called by their module: `sn.repair.absorb_bias`.
# By name: the room, where that is called otherwise.
_MODULES = {
    "averages": "averages",
    "export": "export",
    "port": "porting",
    "repair": "repair",
    "testing": "testing",
}

__all__ = sorted((*_ROOM_OF, *_MODULES))


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return importlib.import_module(f"stillnorm.{_MODULES[name]}")
    if name not in _ROOM_OF:
        raise AttributeError(f"module 'stillnorm' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"stillnorm.{_ROOM_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
