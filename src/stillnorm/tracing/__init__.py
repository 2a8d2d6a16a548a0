"""The one place that runs the user's model under instruments, and who feeds it."""

from stillnorm.tracing.batches import batch_size as batch_size
from stillnorm.tracing.batches import copied as copied
from stillnorm.tracing.batches import each_batch as each_batch
from stillnorm.tracing.batches import first_line as first_line
from stillnorm.tracing.batches import first_tensor as first_tensor
from stillnorm.tracing.calling import Forward as Forward
from stillnorm.tracing.calling import call as call
from stillnorm.tracing.calling import call_example as call_example
from stillnorm.tracing.flow import Flow as Flow
from stillnorm.tracing.flow import Run as Run
from stillnorm.tracing.flow import looking as looking
from stillnorm.tracing.flow import running as running
from stillnorm.tracing.flow import train_by_input as train_by_input
from stillnorm.tracing.flow import training_by_input as training_by_input
from stillnorm.tracing.instrument import Normalization as Normalization
from stillnorm.tracing.measures import by_kernel as by_kernel
from stillnorm.tracing.memory import device_of as device_of
from stillnorm.tracing.memory import free_bytes as free_bytes
from stillnorm.tracing.replay import Diverged as Diverged
from stillnorm.tracing.replay import Replay as Replay
from stillnorm.tracing.replay import Tape as Tape
from stillnorm.tracing.samples import read as read
from stillnorm.tracing.site import Site as Site
from stillnorm.tracing.trace import Call as Call
from stillnorm.tracing.trace import Trace as Trace
from stillnorm.tracing.trace import trace as trace
