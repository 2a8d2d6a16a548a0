"""Folding norms into the layers beside them: in training, step by step, and for inference."""

from stillnorm.folding.fold import fold as fold
from stillnorm.folding.report import FoldReport as FoldReport
