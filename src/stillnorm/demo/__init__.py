"""Five forum threads, replayed on real data with their own code, and solved."""

from stillnorm.demo.replay import Demo as Demo
from stillnorm.demo.replay import run as run
