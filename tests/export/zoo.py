"""Real architectures with statistics of their own data, exported and run in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import stillnorm as sn
from export.nets import exported
from support.architectures import ARCHITECTURES, Architecture
from support.fingerprint import Fingerprint


def built(architecture: Architecture) -> nn.Module:
    """Build it in train mode, its statistics those of one batch."""
    torch.manual_seed(0)
    model = architecture.make().train()
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.momentum = None  # the plain average
    x = architecture.inputs(4, 1)
    with torch.no_grad():
        model(x) if architecture.forward is None else architecture.forward(model, x)
        for norm in norms:
            norm.momentum = 0.1
            if norm.affine:
                norm.weight.uniform_(0.7, 1.3)
                norm.bias.normal_(0, 0.2)
    return model


def exports(name: str, folder: Path) -> None:
    """The file computes what the model does in eval mode, at every batch size; it is as found."""
    architecture = ARCHITECTURES[name]
    model, x = built(architecture), architecture.inputs(2, 5)
    before = Fingerprint(model)
    report = exported(model, x, folder, ".onnx", forward=architecture.forward)
    assert Fingerprint(model).differences(before) == []
    assert [run.batch_size for run in report.runs] == [2, 1, 3]
    assert report.fixed_batch == ""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    assert len(report.remaining) + len(report.absorbed) <= len(norms)
    assert report.remaining or report.absorbed
    # Once more, by other means, on other data and at a size that was not tried.
    runtime = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    other = architecture.inputs(5, 7)
    y, *_ = runtime.run(None, {runtime.get_inputs()[0].name: other.numpy()})
    with sn.eval_mode(model), torch.no_grad():
        call = architecture.forward or (lambda model, batch: model(batch))
        expected = tree_leaves(call(model, other))[0]
    off = (torch.from_numpy(y) - expected).abs().max() / expected.abs().max()
    assert float(off) < 5e-3
