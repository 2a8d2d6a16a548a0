"""Healthy models are silent, but for what is true of their architecture."""

from __future__ import annotations

from stillnorm import check
from support.architectures import ARCHITECTURES

# What is found in healthy models, and why that is right.
TRUE = {
    # Dropout(0.5) of the pyramid pooling stands before the next convolution and its norm.
    "torchvision/deeplabv3_mobilenet_v3_large": {"SN205"},
    # transformers keeps TensorFlow's momenta: 1, 0.997 and 0.99.
    "transformers/mobilenet_v1": {"SN108"},
    "transformers/mobilenet_v2": {"SN108"},
    "transformers/efficientnet": {"SN108"},
}


def names(library: str, part: int = 0, parts: int = 1) -> list[str]:
    """The architectures of one library, or every so many of them."""
    return [name for name in ARCHITECTURES if name.startswith(f"{library}/")][part::parts]


def assert_silent(name: str) -> None:
    """Check a healthy model on 64 samples: no error, no warning, but what is true of it."""
    architecture = ARCHITECTURES[name]
    batches = list(architecture.inputs(64, 1).split(16))
    report = check(architecture.healthy(), batches, forward=architecture.forward)
    assert not report.crashed, report.crashed
    found = {f.code: f.message for f in report.findings if f.severity != "info"}
    assert set(found) == TRUE.get(name, set()), found
