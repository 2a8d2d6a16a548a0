"""Real architectures in onnxruntime: timm."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.zoo import exports

NAMES = (
    "resnet10t",
    "seresnet18",
    "lcnet_050",
    "tinynet_e",
    "mobilenetv4_conv_small",
)


@pytest.mark.parametrize("name", NAMES)
def test_exports(tmp_path: Path, name: str) -> None:
    exports(f"timm/{name}", tmp_path)
