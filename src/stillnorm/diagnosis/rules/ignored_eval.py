"""SN007: norms that `eval()` does not reach."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from stillnorm.diagnosis.evidence import CannotTell, Evidence
from stillnorm.diagnosis.finding import Finding
from stillnorm.diagnosis.rule import Rule
from stillnorm.errors import StillnormError
from stillnorm.norms import NormLayer, overrides_train, walk
from stillnorm.reports.numbers import count
from stillnorm.state import preserved
from stillnorm.tracing import Stray


class IgnoredEval(Rule):
    """Something normalises by the batch although the model is in eval mode.

    What it finds:
        After `model.eval()`, a forward in which a norm with running statistics, or a function,
        still normalises data by the batch: `F.batch_norm(..., training=True)` written out; a norm
        layer in a plain list or dict, or built in the forward, which `eval()` does not know of; a
        `train()` of one's own that does not pass the mode on. And a `train()` that returns None,
        so that `model = model.eval()` loses the model.

    Why it matters:
        Outputs depend on the batch mates, and one sample alone can fail or lose all information.
        Layers that are not registered are in no `state_dict` either: a checkpoint is without them.

    When it is fine:
        Not reported: weights standardised by `F.batch_norm`, as timm's `StdConv2d` does; instance
        norm, also where samples are folded into the channels of one; layers without running
        statistics, which are SN107's. Adapting to the data at test time is meant to use the batch.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norms = [nn.BatchNorm1d(4)]
        ...     def forward(self, x):
        ...         return self.norms[0](x).relu()
        >>> check(Net(), torch.randn(64, 4), select="SN007").findings[0].evidence["kind"]
        'unregistered'

    Fix:
        Advice: make norms in `__init__` and keep them in `nn.ModuleList` or `nn.ModuleDict`; pass
        `training=self.training` to functions; end `train()` with `return super().train(mode)`.

    References:
        pytorch/pytorch#46818 (a norm built in forward); dragen1860/MAML-Pytorch#44
        (`training=True`); d2l-ai/d2l-zh#1265 (statistics in plain attributes).
    """

    code = "SN007"
    slug = "ignored-eval"
    severity = "error"
    needs = ("forward",)
    explains = ("SN105",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding for each way in which `eval()` is lost."""
        yield from self._lost_model(evidence)
        yield from self._registered(evidence)
        yield from self._strays(evidence)

    def _lost_model(self, evidence: Evidence) -> Iterator[Finding]:
        model = evidence.model
        if not overrides_train(model) and type(model).eval is nn.Module.eval:
            return
        with preserved(model):
            returned = model.eval()
        if returned is None:
            kind = type(model).__name__
            yield self.finding(
                ("",),
                f"{kind}.eval() returns None: after model = model.eval() there is no model",
                evidence={"kind": "no return"},
                help=f"end {kind}.train() with: return super().train(mode)",
            )

    def _registered(self, evidence: Evidence) -> Iterator[Finding]:
        layers = [
            layer
            for layer in evidence.in_order(evidence.layers)
            if layer.normalizes_by(training=False) == "running"
            and any(call.used == "batch" for call in evidence.calls(layer))
        ]
        for kind, group in _grouped(evidence, layers).items():
            paths = tuple(layer.path for layer in group)
            verb = "normalises" if len(paths) == 1 else "normalise"
            yield self.finding(
                paths,
                f"{count(len(paths), 'layer')} {verb} by the batch in eval mode: "
                + (f"{kind} does not pass the mode on" if kind else "the forward sets it aside"),
                evidence={"kind": "train override" if kind else "forward"},
                help=f"end {kind} with: return super()."
                + ("eval()" if kind.endswith(".eval()") else "train(mode)")
                if kind
                else "normalise by the batch only where self.training is set",
                where=evidence.where(*group),
            )

    def _strays(self, evidence: Evidence) -> Iterator[Finding]:
        # One row: samples folded into channels, which is instance norm.
        strays = [
            stray
            for stray in evidence.measured.traces["eval"].strays
            if stray.used == "batch" and stray.shape[0] > 1
        ]
        try:
            strays = [x for x in strays if evidence.structure.normalizes_data(x.site)]
        except StillnormError as error:
            raise CannotTell(error.fact) from error
        again = {stray.module for stray in evidence.measured.traces["batch"].strays}
        for kind, (fact, help) in _KINDS.items():
            group = [stray for stray in strays if _kind(stray, again) == kind]
            if group:
                module = group[0].module
                name = "batch_norm" if module is None else type(module).__name__
                yield self.finding(
                    tuple(dict.fromkeys(_path(evidence, stray) for stray in group)),
                    f"{name} {fact} ({count(len(group), 'call')})",
                    evidence={"kind": kind, "calls": len(group)},
                    help=help,
                    where=tuple(dict.fromkeys(str(s.site) for s in group if s.site)),
                )


_KINDS = {
    "function": (
        "is called with training=True in eval mode",
        "pass training=self.training, or use a norm layer",
    ),
    "unregistered": (
        "is no module of the model: eval() and state_dict() do not reach it",
        "keep norm layers in nn.ModuleList or nn.ModuleDict, not in a plain list or dict",
    ),
    "built in forward": (
        "is built anew in each forward: always in train mode, it learns nothing",
        "build norm layers in __init__",
    ),
}


def _kind(stray: Stray, again: set[nn.Module | None]) -> str:
    """Tell a function from a layer, and a layer that is kept from one that is built each time."""
    if stray.module is None:
        return "function"
    return "unregistered" if stray.module in again else "built in forward"


def _path(evidence: Evidence, stray: Stray) -> str:
    """Return the path of the innermost module of the model whose forward made the call."""
    paths = {module: path for path, module, _ in walk(evidence.model)}
    return next((paths[m] for m in reversed(stray.within) if m in paths), "")


def _grouped(evidence: Evidence, layers: Iterable[NormLayer]) -> dict[str, list[NormLayer]]:
    """Group layers by the `train()` that keeps eval mode from them; "" where it is the forward."""
    groups: dict[str, list[NormLayer]] = {}
    for layer in layers:
        owner = ""
        if evidence.modes.in_eval[layer.module]:
            above = (layer.module, *reversed(layer.above))
            guilty = next((module for module in above if overrides_train(module)), None)
            # Without one it can only be an eval() of the model's own that does not call train().
            model = type(evidence.model).__name__
            owner = f"{model}.eval()" if guilty is None else f"{type(guilty).__name__}.train()"
        groups.setdefault(owner, []).append(layer)
    return groups
