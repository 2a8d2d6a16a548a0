"""SN114: a norm that no forward calls."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.evidence.runs import Runs
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms.adapters.keras import is_called_unseen
from stillnorm.reports.numbers import count
from stillnorm.state import preserved
from stillnorm.tracing import Trace, trace


class UnreachedLayer(Rule):
    """A norm layer is in the model, and the forward never calls it.

    What it finds:
        A norm layer that no batch reached, in eval mode nor in train mode.

    Why it matters:
        Its parameters and statistics are saved, counted and optimised for nothing; more often it is
        the trace of a slip: another layer is used in its place, or twice.

    When it is fine:
        Heads for other tasks, parts that only some inputs take. Not reported: branches of train
        mode only, such as Inception's auxiliary head; layers whose statistics a function is given,
        `F.batch_norm(x, bn.running_mean, ...)`. Where the model cannot be called in train
        mode with these batches, nobody can tell, and the report says so.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.bn_1, self.bn_2 = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        ...     def forward(self, x):
        ...         return self.bn_1(x).relu()
        >>> check(Net(), torch.randn(64, 4), select="SN114").findings[0].paths
        ('bn_2',)

    Fix:
        Advice: remove it, or call it.

    References:
        The PyTorch forum, "What does model.eval() do for batchnorm layer?": two of that network's
        seven norms are never called, three others are called several times.
    """

    code = "SN114"
    slug = "unreached-layer"
    severity = "info"
    needs = ("forward",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        runs = evidence.measured
        missed = set(runs.traces["eval"].unreached) & set(runs.traces["batch"].unreached)
        missed -= _used_by_functions(runs.traces["eval"])
        if missed:
            in_train = _in_train(evidence, runs)
            missed &= set(in_train.unreached) - _used_by_functions(in_train)
        paths = tuple(
            layer.path
            for layer in evidence.layers
            if layer.path in missed and not is_called_unseen(layer.module, layer.ancestors)
        )
        if paths:
            verb = "is" if len(paths) == 1 else "are"
            yield self.finding(
                paths,
                f"{count(len(paths), 'layer')} {verb} called in neither mode",
                help="remove what is not used, or use it",
            )


def _used_by_functions(seen: Trace) -> set[str]:
    """Return the layers that are not called while their statistics are used."""
    return {stray.layer.path for stray in seen.strays if stray.layer is not None}


def _in_train(evidence: Evidence, runs: Runs) -> Trace:
    """Run one batch in train mode."""
    model = evidence.model
    with preserved(model):
        model.train()
        try:
            return trace(model, iter(runs.batches[:1]), forward=runs.forward, flow="as_is")
        except Exception as error:
            raise CannotTell(f"the model cannot be called in train mode: {error}") from error
