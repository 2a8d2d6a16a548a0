"""`inspect`: what every norm layer does, and the screen that says it."""

from stillnorm.diagnosis.inspection.inspection import Inspected as Inspected
from stillnorm.diagnosis.inspection.inspection import Inspection as Inspection
from stillnorm.diagnosis.inspection.inspection import inspect as inspect
