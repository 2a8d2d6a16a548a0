"""Assertions about norm layers, for the test suite of whoever has a model."""

from stillnorm.testing.frozen import assert_frozen_through as assert_frozen_through
from stillnorm.testing.healthy import assert_healthy as assert_healthy
from stillnorm.testing.independent import assert_batch_independent as assert_batch_independent
