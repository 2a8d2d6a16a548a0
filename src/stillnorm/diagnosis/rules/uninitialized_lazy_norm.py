"""SN210: a lazy norm before its first forward."""

from __future__ import annotations

from collections.abc import Iterator

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.reports.numbers import count


class UninitializedLazyNorm(Rule):
    """A lazy norm layer has not seen its first input.

    What it finds:
        `LazyBatchNorm` and `LazyInstanceNorm` layers that do not know their number of channels yet.

    Why it matters:
        They have neither parameters nor statistics: an optimizer made now is an error or misses
        them, `convert_sync_batchnorm` turns them into layers of zero channels, and nothing else can
        be checked about them.

    When it is fine:
        Before the first forward that is what they are for. Not reported: lazy layers that have been
        called, and are ordinary ones since.

    Example:
        >>> from torch import nn
        >>> from stillnorm import check
        >>> [f.slug for f in check(nn.Sequential(nn.LazyBatchNorm2d())).findings]
        ['uninitialized-lazy-norm']

    Fix:
        Advice: call the model once on a batch, in eval mode, before anything else is done with it.

    References:
        pytorch/pytorch#187771 (conversion to SyncBatchNorm); the documentation of
        `torch.nn.modules.lazy.LazyModuleMixin`.
    """

    code = "SN210"
    slug = "uninitialized-lazy-norm"
    severity = "info"
    needs = ("tree",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        paths = tuple(layer.path for layer in evidence.layers if layer.is_lazy)
        if paths:
            verb = "has" if len(paths) == 1 else "have"
            yield self.finding(
                paths,
                f"{count(len(paths), 'lazy layer')} {verb} not been called yet",
                evidence={"layers": len(paths)},
                help="call the model once on a batch, before an optimizer is made",
            )
