"""The one table of tolerances. Units say themselves: relative and absolute as in torch.testing."""

from __future__ import annotations

import torch

# dtype: (rtol, atol), those of torch.testing.assert_close.
CLOSE = {
    torch.float64: (1e-7, 1e-7),
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
}

# Gradients of a held layer against an eval-mode layer, in units in the last place.
GRADIENT_ULP = {torch.float64: 2, torch.float32: 2, torch.float16: 0, torch.bfloat16: 0}

# Recalibrated statistics against float64, relative (promise 8).
STATISTICS_RTOL = 1e-6
