"""What the rules read: what `check` was given, and what running it has shown."""

from stillnorm.diagnosis.evidence.evidence import SENSITIVE as SENSITIVE
from stillnorm.diagnosis.evidence.evidence import CannotTell as CannotTell
from stillnorm.diagnosis.evidence.evidence import Evidence as Evidence
