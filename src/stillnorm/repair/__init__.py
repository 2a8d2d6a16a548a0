"""Repairing what `check` finds: model surgery that is planned, all or nothing, and undoable."""

from stillnorm.repair.per_call import SplitNorm as SplitNorm
from stillnorm.repair.report import SplitReport as SplitReport
from stillnorm.repair.split import split_shared as split_shared
from stillnorm.repair.track import TrackReport as TrackReport
from stillnorm.repair.track import track_statistics as track_statistics
