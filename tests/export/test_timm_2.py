"""Real architectures in onnxruntime: timm."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.zoo import exports

NAMES = (
    "repvgg_a0",
    "dla46_c",
    "regnety_002",
    "resnest14d",
    "skresnet18",
    "fasternet_t0",
    "mnasnet_small",
)


@pytest.mark.parametrize("name", NAMES)
def test_exports(tmp_path: Path, name: str) -> None:
    exports(f"timm/{name}", tmp_path)
