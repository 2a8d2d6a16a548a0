"""Repairing what `check` finds: model surgery that is planned, all or nothing, and undoable."""

from stillnorm.repair.affine import AffineNorm as AffineNorm
from stillnorm.repair.bias import absorb_bias as absorb_bias
from stillnorm.repair.optimizer import GradientReport as GradientReport
from stillnorm.repair.optimizer import OptimizerReport as OptimizerReport
from stillnorm.repair.optimizer import RepairedGroup as RepairedGroup
from stillnorm.repair.optimizer import drop_stale_gradients as drop_stale_gradients
from stillnorm.repair.optimizer import repair_optimizer as repair_optimizer
from stillnorm.repair.per_call import SplitNorm as SplitNorm
from stillnorm.repair.per_call import shared_state_dict as shared_state_dict
from stillnorm.repair.replace import replace as replace
from stillnorm.repair.report import ReplaceReport as ReplaceReport
from stillnorm.repair.report import SplitReport as SplitReport
from stillnorm.repair.split import split_shared as split_shared
from stillnorm.repair.statistics import RepairReport as RepairReport
from stillnorm.repair.statistics import clamp_variance as clamp_variance
from stillnorm.repair.statistics import clone_inference_tensors as clone_inference_tensors
from stillnorm.repair.statistics import convert_variance as convert_variance
from stillnorm.repair.statistics import reset_statistics as reset_statistics
from stillnorm.repair.statistics import to_float32 as to_float32
from stillnorm.repair.track import TrackReport as TrackReport
from stillnorm.repair.track import track_statistics as track_statistics
