"""Real architectures in onnxruntime: transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.zoo import exports

NAMES = (
    "resnet",
    "regnet",
    "mobilenet_v1",
    "mobilenet_v2",
    "levit",
    "segformer",
)


@pytest.mark.parametrize("name", NAMES)
def test_exports(tmp_path: Path, name: str) -> None:
    exports(f"transformers/{name}", tmp_path)
