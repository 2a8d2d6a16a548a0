"""Exporting the eval function of a model, and proving that the file computes it."""

from stillnorm.export.report import ExportReport as ExportReport
from stillnorm.export.verbs import export_onnx as export_onnx
from stillnorm.export.verbs import export_program as export_program
