r"""How far what a file computes is off what the model computes.

For each output, with d the difference and y what the model computes in eval mode:

    rms = rms(d) / rms(y)        at most    √eps, which is 3.5e-4 in float32
    max = max|d| / max|y|        at most 10 √eps, which is 3.5e-3 in float32

where eps is that of the coarsest dtype that the model computes in: exporters fold, reorder and
fuse, which rounds differently and not worse. Where the model itself is off by more than a quarter
of that from what it computes in float64, four times its own error is allowed, and ten times the
above at most. Networks with random weights, which amplify rounding most, are off by 1e-6 to 1e-3,
a norm by other statistics by 1e-2 and more.
Of integers and booleans one in a thousand may differ: an argmax turns where two values are a
rounding apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_INTEGERS = 1e-3  # of the values of an output without fractions


@dataclass(frozen=True)
class OutputError:
    """How far one output is off.

    Args:
        name: Its name in the file.
        rms: The root mean square of the difference, relative to that of the output; of integers the
            part that differs.
        max: The largest difference, relative to the largest value.
    """

    name: str
    rms: float
    max: float


@dataclass(frozen=True)
class Tolerance:
    """How far an output may be off.

    Args:
        rms: Relative to the root mean square of the output.
        max: Relative to its largest value.
    """

    rms: float
    max: float

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Tolerance:
        """Return that of the coarsest floating dtype among the tensors.

        Example:
            >>> Tolerance.of([torch.ones(1), torch.ones(1, dtype=torch.long)])
            Tolerance(rms=0.000345..., max=0.00345...)
        """
        eps = [torch.finfo(t.dtype).eps for t in tensors if t.is_floating_point()]
        root = math.sqrt(max(eps, default=torch.finfo(torch.float32).eps))
        return cls(root, 10 * root)

    def raised_to(self, own: OutputError) -> Tolerance:
        """Return four times the model's own rounding, where that is more; ten times this at most.

        Example:
            >>> Tolerance(1e-4, 1e-3).raised_to(OutputError("", 1e-4, 1.0))
            Tolerance(rms=0.0004, max=0.01)
        """
        rms, largest = (max(a, 4 * b) for a, b in ((self.rms, own.rms), (self.max, own.max)))
        return Tolerance(min(rms, 10 * self.rms), min(largest, 10 * self.max))

    def allows(self, error: OutputError) -> bool:
        """Tell whether an output is right; never where a number is not finite in one of the two."""
        return error.rms <= self.rms and error.max <= self.max


def errors(
    got: Sequence[Tensor], expected: Sequence[Tensor], names: Sequence[str]
) -> tuple[OutputError, ...]:
    """Compare outputs, which must correspond in number.

    Example:
        >>> errors([torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 4.0])], ["y"])[0].max
        0.25
    """
    pairs = zip(got, expected, names, strict=True)
    return tuple(OutputError(name, *_error(a.cpu(), b.detach().cpu())) for a, b, name in pairs)


def _error(got: Tensor, expected: Tensor) -> tuple[float, float]:
    if got.shape != expected.shape:
        return math.inf, math.inf
    if expected.numel() == 0:
        return 0.0, 0.0
    if not (expected.is_floating_point() or expected.is_complex()):
        differing = float((got != expected).double().mean())
        return (0.0, 0.0) if differing <= _INTEGERS else (differing, math.inf)
    wide = torch.complex128 if expected.is_complex() else torch.float64
    x, y = got.to(wide), expected.to(wide)
    finite = y.isfinite()
    if not torch.equal(x[~finite].nan_to_num(), y[~finite].nan_to_num()):
        return math.inf, math.inf
    if not bool(x[finite].isfinite().all()):
        return math.inf, math.inf
    d, y = (x[finite] - y[finite]).abs(), y[finite].abs()
    if d.numel() == 0:
        return 0.0, 0.0
    return _ratio(_rms(d), _rms(y)), _ratio(float(d.max()), float(y.max()))


def _rms(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


def _ratio(error: float, scale: float) -> float:
    return error / scale if scale > 0 else error
