"""Freeze norm layers so that they stay frozen, and take it back."""

from stillnorm.freezing.freeze import freeze as freeze
from stillnorm.freezing.freeze import is_frozen as is_frozen
from stillnorm.freezing.freeze import unfreeze as unfreeze
from stillnorm.freezing.report import FreezeReport as FreezeReport
from stillnorm.freezing.report import UnfreezeReport as UnfreezeReport
