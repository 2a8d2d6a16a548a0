"""Re-estimating running statistics: the algebra, the pass over the data, the commit, the report."""

from stillnorm.calibration.progress import Progress as Progress
from stillnorm.calibration.recalibration import recalibrate as recalibrate
from stillnorm.calibration.report import Recalibrated as Recalibrated
from stillnorm.calibration.report import RecalibrationReport as RecalibrationReport
