"""Which layers a repair would change: it is made, and taken back at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import nn

from stillnorm.errors import StillnormError
from stillnorm.norms import NormLayer
from stillnorm.repair import SplitReport, TrackReport
from stillnorm.state import preserved


def accepted(
    model: nn.Module, layers: Iterable[NormLayer], repair: Callable[[], SplitReport | TrackReport]
) -> tuple[str, ...]:
    """Return the paths of the layers that the repair does not refuse; none where it raises."""
    with preserved(model):
        try:
            report = repair()
        except StillnormError:
            return ()
        report.undo()
    refused = {path for path, _ in report.refused}
    return tuple(layer.path for layer in layers if layer.path not in refused)
