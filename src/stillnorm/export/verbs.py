"""The verbs: `export_onnx`, and `export_program` for `torch.export`."""

from __future__ import annotations

from torch import nn

from stillnorm.export.files import target_of
from stillnorm.export.onnx_graph import must_be_installed, write_onnx
from stillnorm.export.program import write_program
from stillnorm.export.report import ExportReport
from stillnorm.export.writing import Dynamic, export
from stillnorm.state.files import StrPath
from stillnorm.tracing import Forward


def export_onnx(
    model: nn.Module,
    example: object,
    path: StrPath,
    *,
    forward: Forward | None = None,
    dynamic: Dynamic = True,
) -> ExportReport:
    """Export the eval function of a model to ONNX, and prove that the file computes it.

    Written by ``torch.onnx.export(..., dynamo=True)``. Before the file takes its place it is run in
    onnxruntime, on the example and on its samples in other batch sizes, and compared with the model
    in eval mode. Held, folded and split norms are exported as what they are. Inputs are called as
    the parameters of the forward or the keys of the example, outputs after the structure that the
    model returns: ``{"logits": y, "aux": {"n": z}}`` gives ``logits`` and ``aux.n``, a tensor alone
    ``output``.

    Args:
        model: The model, in any mode. Inside `torch.compile` or DistributedDataParallel, the model
            in it is exported.
        example: An input, as `torch.export` takes it: a tensor, a tuple of positional arguments, a
            mapping of keyword arguments.
        path: Where to write: a name that ends in ``.onnx``.
        forward: ``(model, example) -> output``, where the model cannot be called on the example, or
            only a part of its output is wanted.
        dynamic: True: the batch size is left open where torch can. False: it is that of the
            example. Or the ``dynamic_shapes`` of `torch.export.export`, which are passed on.

    Returns:
        The report: inputs and outputs, which norms are still batch norms, the errors of every
        output at every batch size that was run, and what `check` says of the statistics without
        data: initial ones (SN101, SN004) or stale ones (SN115) are exported as they are. Allowed
        errors are 3.5e-4 (root mean square of the difference, relative to that of the output) and
        3.5e-3 (the largest, relative to the largest value) in float32, in half precision 0.03 and
        0.3, and more where the model itself rounds worse (see `stillnorm.export.compare`). Usual
        are 1e-6 to 1e-5.

    Raises:
        ExportError: A finding speaks against it: eval depends on the batch (SN007, SN107), the
            statistics are not finite or negative (SN102, SN103). Or the output proves nothing: no
            tensor, no finite number, or another each time. Or torch cannot export the model,
            onnxruntime cannot run the file, the file computes something else or has a norm in
            training mode (SN701). Or a package of ``stillnorm[onnx]`` is not installed.
        ModelError: It is no model of torch's.
        BatchError: The model cannot be called on the example.
        StateError: The model has lazy modules or tensors on the meta device, is TorchScript's, or
            its own `eval()` raises.
        FileFormatError: The file cannot be written.

    Mutates:
        Nothing, whatever is raised: modes, statistics, attributes, hooks and random states of the
        model are as found, and what was at `path` is still there. Hooks do run, on the exporter's
        tensors too.

    Cost:
        The export, of the example and where that fails with a fixed batch size; about a dozen
        forwards. Of two threads one waits: torch's exporters do not run beside one another.

    Example:
        >>> import tempfile
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).train()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_onnx(net, torch.randn(2, 4), f"{folder}/net.onnx")
        >>> [run.batch_size for run in report.runs], report.max_error < 1e-5, net.training
        ([2, 1, 3], True, True)
        >>> print(report.inputs[0], "->", report.outputs[0])
        input float32 (batch, 4) -> output float32 (batch, 8)

    Source: the failures that it is made against, pytorch/pytorch#75252, #49229, #52867 and #115715,
    microsoft/onnxscript#1338 and #1791, microsoft/onnxruntime#26584.
    """
    must_be_installed()
    target = target_of(path, ".onnx")
    return export(write_onnx, "ONNX graph", model, example, target, forward, dynamic)


def export_program(
    model: nn.Module,
    example: object,
    path: StrPath,
    *,
    forward: Forward | None = None,
    dynamic: Dynamic = True,
) -> ExportReport:
    """Export the eval function of a model with `torch.export`, and prove that the file computes it.

    As `export_onnx`, without ONNX: the file is an archive of `torch.export.save`, which torch loads
    and runs without the model's code and without stillnorm. It is loaded again and compared. It
    takes and returns the structures that the model does.

    Args:
        model: The model, in any mode.
        example: An input: a tensor, a tuple of positional arguments, a mapping of keyword
            arguments.
        path: Where to write: a name that ends in ``.pt2``.
        forward: ``(model, example) -> output``, where the model cannot be called on the example.
        dynamic: True: the batch size is left open where torch can. False: it is that of the
            example. Or the ``dynamic_shapes`` of `torch.export.export`, which are passed on.

    Returns:
        The report, as `export_onnx`.

    Raises:
        ExportError: As `export_onnx`; the norms' ``training`` argument is checked in the file.
        ModelError: It is no model of torch's.
        BatchError: The model cannot be called on the example.
        StateError: As `export_onnx`.
        FileFormatError: The file cannot be written.

    Mutates:
        Nothing, whatever is raised.

    Cost:
        As `export_onnx`; the file once in memory.

    Example:
        >>> import tempfile
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)).train()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_program(net, torch.randn(2, 4), f"{folder}/net.pt2")
        >>> report.remaining, report.inputs[0].shape, report.fixed_batch
        (('1',), ('batch', 4), '')
    """
    target = target_of(path, ".pt2")
    return export(write_program, "exported program", model, example, target, forward, dynamic)
