"""Whatever takes a model says so when it is given something else, and says what that is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import stillnorm as sn
from stillnorm.errors import ModelError

X = torch.randn(2, 3)


def entered(context: Callable[[Any], AbstractContextManager[object]]) -> Callable[[Any], None]:
    def enter(model: Any) -> None:
        with context(model):
            pass

    return enter


CALLS: dict[str, Callable[[Any], object]] = {
    "inspect": sn.inspect,
    "check": sn.check,
    "freeze": sn.freeze,
    "unfreeze": sn.unfreeze,
    "is_frozen": sn.is_frozen,
    "snapshot": sn.snapshot,
    "eval_mode": entered(sn.eval_mode),
    "no_updates": entered(sn.no_updates),
    "preserved": entered(sn.preserved),
    "fold": lambda model: sn.fold(model, X),
    "split_shared": lambda model: sn.split_shared(model, [X]),
    "track_statistics": lambda model: sn.track_statistics(model, [X]),
    "replace": lambda model: sn.replace(model, "group"),
    "recalibrate": lambda model: sn.recalibrate(model, [X]),
    "export_onnx": lambda model: sn.export_onnx(model, X, "net.onnx"),
    "export_program": lambda model: sn.export.export_program(model, X, "net.pt2"),
    "to_float32": sn.repair.to_float32,
    "drop_stale_gradients": sn.repair.drop_stale_gradients,
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("wrong", [None, 5, torch.nn.BatchNorm2d])
def test_it_is_named(name: str, wrong: Any) -> None:
    with pytest.raises(ModelError, match=f"a {type(wrong).__name__} is no torch.nn.Module"):
        CALLS[name](wrong)
    with pytest.raises(TypeError):
        CALLS[name](wrong)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("inspect", "check")])
def test_a_path_is_no_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a str is no"):
        CALLS[name](str(tmp_path / "net.pt"))
