"""The state of a model's norm layers: keeping it, pausing it, putting it back, proving it."""

from stillnorm.state.modes import eval_mode as eval_mode
from stillnorm.state.modes import no_updates as no_updates
from stillnorm.state.modes import preserved as preserved
