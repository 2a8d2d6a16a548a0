"""SN701: an exported graph that normalises by the batch."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.reports.numbers import count


class TrainingModeArtifact(Rule):
    """An ONNX graph or exported program normalises by the batch it is given.

    What it finds:
        In an `.onnx` file a BatchNormalization in training mode, or one whose mean is computed from
        the data; in a `.pt2` of `torch.export` a batch norm with `training` true or without running
        statistics. Branches, loops and functions count too.

    Why it matters:
        What runs is not what was evaluated: the output of a sample depends on the others in its
        batch, and with a batch of one its own mean is taken from it. A graph has no `eval()` that
        would help, and nothing fails: the file loads, runs and returns numbers of the right shape.

    When it is fine:
        A graph that is to be trained on, as for quantisation-aware training or training on the
        device. Not reported: instance norm and weight standardisation, which exporters write as a
        batch norm of one sample: nothing is mixed there.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))  # in train mode
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     exported = torch.export.export(net, (torch.randn(2, 4),))
        ...     torch.export.save(exported, f"{folder}/net.pt2")
        ...     report = check(f"{folder}/net.pt2")
        >>> report.findings[0].slug, report.findings[0].paths
        ('training-mode-artifact', ('1',))

    Fix:
        None in the file. Export again after `model.eval()`; a layer without running statistics gets
        them from `sn.track_statistics(model, batches)` first.

    References:
        pytorch/pytorch#75252, #52867 and #115715 (DenseNet 1.7 % instead of 72.9 %);
        microsoft/onnxscript#1338; microsoft/onnxruntime#26584.
    """

    code = "SN701"
    slug = "training-mode-artifact"
    severity = "error"
    needs = ("checkpoint",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        file = evidence.request.file
        if file is None or file.kind == "checkpoint":
            raise CannotTell("a state dict has no graph, as an .onnx or a .pt2 file has")
        by_batch = [norm for norm in file.norms if norm.uses == "batch"]
        if not by_batch:
            return
        paths = tuple(norm.path for norm in by_batch)
        bare = [norm.path for norm in by_batch if "running_mean" not in norm.tensors]
        yield self.finding(
            paths,
            f"{len(paths)} of {count(len(file.norms), 'norm layer')} in the {file.kind} "
            "normalise by the batch: the output of a sample depends on the others",
            evidence={"by_batch": len(paths), "of": len(file.norms), "no_statistics": len(bare)},
            note=f"{count(len(bare), 'layer')} of them without running statistics: eval() alone "
            "does not change that"
            if bare
            else "",
            help="model.eval(), then export again"
            + ("; before it sn.track_statistics(model, batches)" if bare else ""),
        )
