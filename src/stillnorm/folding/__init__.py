"""Folding norms into the layers beside them: in training, step by step, and for inference."""
