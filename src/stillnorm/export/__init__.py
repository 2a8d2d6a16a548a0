"""Exporting the eval function of a model, and proving that the file computes it.

    export_onnx(model, example, path)     an ONNX graph, also as stillnorm.export_onnx
    export_program(model, example, path)  a program of torch.export, .pt2

Both return an `ExportReport`. On the command line: ``stillnorm export``.
"""

from stillnorm.export.report import ExportReport as ExportReport
from stillnorm.export.verbs import export_onnx as export_onnx
from stillnorm.export.verbs import export_program as export_program
