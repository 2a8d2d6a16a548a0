"""What is wrong with a model's norm layers: the evidence, the rules, the report."""

from stillnorm.diagnosis.codes import CODES as CODES
from stillnorm.diagnosis.codes import lookup as lookup
from stillnorm.diagnosis.finding import Finding as Finding
from stillnorm.diagnosis.finding import Fix as Fix
from stillnorm.diagnosis.inspection import Inspection as Inspection
from stillnorm.diagnosis.inspection import inspect as inspect
from stillnorm.diagnosis.report import Report as Report
from stillnorm.diagnosis.rule import Rule as Rule
from stillnorm.diagnosis.runner import check as check
from stillnorm.diagnosis.verdict import Verdict as Verdict
