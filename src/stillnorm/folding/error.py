r"""How far a fold is off: its rounding errors beside those of the layers that it replaces.

A fold is right when, on the layer's own input and against float64,

    rms(folded - exact)  <=  2 rms(unfolded - exact) + 4 ulp(rms(exact))

The unfolded error alone would be no measure, since it can be 0; a maximum would be one of chance.
What is in float64 is measured in float32: nothing is exact beside float64 itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FoldError:
    """The rounding errors of a fold on one input.

    Args:
        folded: The root mean square error of the fold.
        unfolded: That of the two layers.
        scale: The root mean square of the exact output.
        dtype: The dtype of the output.
    """

    folded: float
    unfolded: float
    scale: float
    dtype: torch.dtype

    @property
    def bound(self) -> float:
        """The largest error of a fold that is right."""
        return 2 * self.unfolded + 4 * torch.finfo(self.dtype).eps * self.scale

    @property
    def is_right(self) -> bool:
        """Whether the error is within the bound; never where anything is not finite."""
        return self.folded <= self.bound

    def __str__(self) -> str:
        return f"off by {self.folded:.2g} (rms), the two layers by {self.unfolded:.2g}"


def fold_error(folded: Tensor, unfolded: Tensor, exact: Tensor) -> FoldError:
    """Compare a fold with what it replaces.

    Args:
        folded: The output of the fold.
        unfolded: The output of the layers.
        exact: The output in float64.

    Example:
        >>> x = torch.ones(3)
        >>> fold_error(x, x, x.double()).is_right
        True
    """
    return FoldError(
        _rms(folded.double() - exact), _rms(unfolded.double() - exact), _rms(exact), folded.dtype
    )


def measured_in(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the rounding errors of a layer are measured."""
    return torch.float32 if dtype == torch.float64 else dtype


def _rms(tensor: Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt()) if tensor.numel() else 0.0
