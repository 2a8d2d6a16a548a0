"""The state of a model's norm layers: keeping it, pausing it, putting it back, proving it."""

from stillnorm.state.change import SwitchChange as SwitchChange
from stillnorm.state.change import TensorChange as TensorChange
from stillnorm.state.diff import Difference as Difference
from stillnorm.state.diff import diff_states as diff_states
from stillnorm.state.files import read_state as read_state
from stillnorm.state.files import write_tensors as write_tensors
from stillnorm.state.journal import Journal as Journal
from stillnorm.state.journal import put_back as put_back
from stillnorm.state.kept import attributes_kept as attributes_kept
from stillnorm.state.modes import eval_mode as eval_mode
from stillnorm.state.modes import no_updates as no_updates
from stillnorm.state.modes import preserved as preserved
from stillnorm.state.snapshot import Snapshot as Snapshot
from stillnorm.state.snapshot import snapshot as snapshot
