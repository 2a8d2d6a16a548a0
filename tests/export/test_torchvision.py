"""Real architectures in onnxruntime: torchvision."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.zoo import exports

NAMES = (
    "resnet18",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "mnasnet0_5",
    "r3d_18",
    "lraspp_mobilenet_v3_large",
    "fasterrcnn",
)


@pytest.mark.parametrize("name", NAMES)
def test_exports(tmp_path: Path, name: str) -> None:
    exports(f"torchvision/{name}", tmp_path)
