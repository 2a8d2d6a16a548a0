"""What a norm layer is: the view on one layer, finding layers, selecting them, their modes."""

from stillnorm.norms.find import find_norms as find_norms
from stillnorm.norms.hold import Hold as Hold
from stillnorm.norms.hold import hold_of as hold_of
from stillnorm.norms.layer import NormalizesBy as NormalizesBy
from stillnorm.norms.layer import NormLayer as NormLayer
from stillnorm.norms.paths import clean_path as clean_path
from stillnorm.norms.paths import every_module as every_module
from stillnorm.norms.paths import must_be_a_model as must_be_a_model
from stillnorm.norms.paths import walk as walk
from stillnorm.norms.probe import Modes as Modes
from stillnorm.norms.probe import overrides_train as overrides_train
from stillnorm.norms.probe import probe_modes as probe_modes
from stillnorm.norms.select import Layers as Layers
from stillnorm.norms.select import matcher as matcher
from stillnorm.norms.select import select as select
from stillnorm.norms.tensors import keep_tensors as keep_tensors
from stillnorm.norms.tensors import keep_types as keep_types
from stillnorm.norms.tensors import same_bits as same_bits
from stillnorm.norms.tensors import write as write
from stillnorm.norms.undo import random_kept as random_kept
