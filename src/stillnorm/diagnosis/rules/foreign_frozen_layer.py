"""SN603: another library's frozen layer that is not BatchNorm in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.finding import Finding, Fix
from stillnorm.diagnosis.rule import Rule
from stillnorm.norms import NormLayer
from stillnorm.reports.document import Table
from stillnorm.reports.numbers import short

SHOWN = 3
TORCH_EPS = 1e-5  # what nn.BatchNorm2d adds where nobody says otherwise
_HALF = (torch.float16, torch.bfloat16)
_TINY = 1e-12  # a variance beside which any eps shows; with 0 itself, no eps gives NaN
_VARIANCES = (_TINY, 1e-4, 1.0)


class ForeignFrozenLayer(Rule):
    """Another library's frozen layer computes something else than BatchNorm in eval mode.

    What it finds:
        Layers of the kind FrozenBatchNorm2d (torchvision, timm, detectron2, transformers and the
        copies of them) whose forward adds another eps than the layer says, none, or not to the
        variance; that have an activation or another module inside and never call it; or that return
        float32 for half precision, where the model is in half precision or the batches show that
        the layer receives it.

        The layer's own forward is asked, on a few numbers: nothing is known by name.

    Why it matters:
        The layer stands for a BatchNorm whose weights it was given, and its outputs are not those.
        An eps of 0 makes infinities of channels with variance 0; the eps of another library moves
        channels with small variances; a lost activation makes a block linear; float32 outputs
        double the memory of what follows under autocast, and a half convolution rejects them.

    When it is fine:
        When the network was trained with this very layer: it then knows no other. Hence a remark.
        torchvision's layer returns float32 for half precision by design; not reported where
        nothing is in half precision.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from stillnorm import check
        >>> class FrozenBatchNorm2d(nn.Module):  # as it was first published, without eps
        ...     def __init__(self, n):
        ...         super().__init__()
        ...         for name in ("weight", "bias", "running_mean", "running_var"):
        ...             self.register_buffer(name, torch.ones(n))
        ...     def forward(self, x):
        ...         scale = self.weight * self.running_var.rsqrt()
        ...         shift = self.bias - self.running_mean * scale
        ...         return x * scale[:, None, None] + shift[:, None, None]
        >>> check(nn.Sequential(nn.Conv2d(3, 8, 3), FrozenBatchNorm2d(8))).findings[0].slug
        'foreign-frozen-layer'

    Fix:
        Unsafe: `sn.replace(model, "batch")`, a BatchNorm2d held by stillnorm with the same tensors
        and the eps that is really added; it returns the dtype that it is given. Not offered where
        an eps is declared and not used, is not added to the variance, or a module is not called:
        there the right function has to be chosen by hand.

    References:
        pytorch/vision#2169, #1947, #2599 and #1815; facebookresearch/detectron2#3160;
        pytorch/pytorch#43614.
    """

    code = "SN603"
    slug = "foreign-frozen-layer"
    severity = "info"
    needs = ("tree",)

    def find(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield one finding that names every such layer."""
        found: dict[NormLayer, _Facts] = {}
        for layer in evidence.layers:
            facts = _facts(evidence, layer)
            if facts is not None and facts.words:
                found[layer] = facts
        if not found:
            return
        first, facts = next(iter(found.items()))
        fixable = tuple(layer.path for layer, facts in found.items() if facts.replaceable)
        yield self.finding(
            tuple(layer.path for layer in found),
            f"{first.kind} of {first.provider} is not BatchNorm in eval mode: {facts.words[0]}",
            evidence={
                "layers": {
                    layer.path: {
                        "eps": facts.declared,
                        "eps_added": facts.added,
                        "uncalled": list(facts.uncalled),
                        "half_to_float32": facts.widens,
                    }
                    for layer, facts in found.items()
                }
            },
            table=Table(
                ("", ""),
                tuple((x.path or "(root)", "; ".join(f.words)) for x, f in found.items())[:SHOWN],
                "ll",
            ),
            help='sn.replace(model, "batch") makes BatchNorm2d held by stillnorm of them'
            if fixable
            else "build the layer with the function that its BatchNorm had",
            fix=Fix("replace by a held BatchNorm", "unsafe", "replace", fixable, "batch")
            if fixable
            else None,
            where=evidence.where(*found),
        )


@dataclass(frozen=True)
class _Facts:
    """What a layer's own forward has shown.

    Args:
        declared: The eps that it should add: its own, or torch's where it has none.
        added: What it adds to a tiny variance.
        constant: Whether it adds the same to every variance, as BatchNorm does.
        read: Whether that is what stillnorm takes for the layer's eps.
        uncalled: The modules inside that it does not call.
        widens: Whether half precision comes out as another dtype, where that matters here.
    """

    declared: float
    added: float
    constant: bool
    read: bool
    uncalled: tuple[str, ...]
    widens: bool

    @property
    def words(self) -> list[str]:
        """What deviates, in words."""
        words = []
        if not self.constant:
            words.append("eps is not added to the variance")
        elif not _same(self.added, self.declared):
            words.append(f"it adds {_eps(self.added)}, where BatchNorm adds {_eps(self.declared)}")
        if self.uncalled:
            words.append(f"it never calls its {', '.join(self.uncalled)}")
        if self.widens:
            words.append("half precision comes out as float32")
        return words

    @property
    def replaceable(self) -> bool:
        """Whether BatchNorm with the eps that is added computes the same."""
        return self.constant and self.read and not self.uncalled


def _facts(evidence: Evidence, layer: NormLayer) -> _Facts | None:
    """Ask a foreign frozen layer; None for other layers, and for those that cannot be asked."""
    mean = layer.running_mean
    if layer.family != "frozen" or layer.is_scripted or mean is None or mean.is_meta:
        return None
    try:
        parts = [_added(layer, variance) for variance in _VARIANCES]
    except Exception:  # a forward that takes something else than images, or gives no scale
        return None
    declared = getattr(layer.module, "eps", None)
    return _Facts(
        declared=float(declared) if isinstance(declared, int | float) else TORCH_EPS,
        added=parts[0],
        constant=all(
            _same(part, parts[0], among=v) for part, v in zip(parts, _VARIANCES, strict=True)
        ),
        read=_same(parts[0], layer.eps),
        uncalled=_uncalled(layer),
        widens=_gets_half(evidence, layer) and _widens(layer),
    )


def _same(a: float, b: float, among: float = 0.0) -> bool:
    """Tell whether two eps are one, up to float32 and what the subtraction of a variance loses."""
    return abs(a - b) <= 1e-3 * max(a, b) + 1e-6 * among


def _eps(value: float) -> str:
    return f"an eps of {short(value)}" if value else "no eps"


# ---------------------------------------------------------------------- asking a twin of the layer


class _Asked(nn.Module):
    """Stands for a module inside the layer: passes on, and remembers that it was called."""

    called = False

    def forward(self, x: Tensor) -> Tensor:
        """Return the input."""
        self.called = True
        return x


def _twin(layer: NormLayer, variance: float, dtype: torch.dtype) -> nn.Module:
    """Return a module of the layer's class with statistics of our own; the layer stays its own."""
    values = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": variance}
    kind = type(layer.module)
    twin: nn.Module = kind.__new__(kind)
    buffers = {
        name: torch.full(value.shape, values[name], dtype=dtype) if name in values else value
        for name, value in layer.module._buffers.items()
        if value is not None
    }
    modules = {name: _Asked() for name, child in layer.module._modules.items() if child is not None}
    twin.__dict__.update(vars(layer.module), training=False, _buffers=buffers, _modules=modules)
    return twin


@torch.no_grad()
def _output(twin: nn.Module, layer: NormLayer, dtype: torch.dtype) -> Tensor:
    """Call the forward itself, without the user's hooks, on ones."""
    output: Tensor = twin.forward(torch.ones(1, layer.num_features, 1, 1, dtype=dtype))
    return output


def _added(layer: NormLayer, variance: float) -> float:
    """Return what the layer adds to a variance: 1 comes out as 1 / sqrt(variance + eps)."""
    twin = _twin(layer, variance, torch.float64)
    scale = float(_output(twin, layer, torch.float64).flatten()[0])
    eps = 1 / scale**2 - variance
    return 0.0 if abs(eps) < _TINY / 100 else eps


def _uncalled(layer: NormLayer) -> tuple[str, ...]:
    """Return the modules inside that would change something and are not called."""
    twin = _twin(layer, 1.0, torch.float64)
    _output(twin, layer, torch.float64)
    return tuple(
        name
        for name, child in twin._modules.items()
        if not (isinstance(child, _Asked) and child.called)
        and not isinstance(layer.module._modules[name], nn.Identity)
    )


def _widens(layer: NormLayer) -> bool:
    try:
        half = _output(_twin(layer, 1.0, torch.float32), layer, torch.bfloat16)
    except Exception:  # it does not take half precision at all
        return False
    return half.dtype != torch.bfloat16


def _gets_half(evidence: Evidence, layer: NormLayer) -> bool:
    """Tell whether half precision arrives at float32 buffers: seen, or by the model's weights."""
    own = layer.running_var
    if own is None or own.dtype in _HALF:
        return False
    if calls := evidence.calls(layer):
        return any(call.dtype in _HALF for call in calls)
    return any(parameter.dtype in _HALF for parameter in evidence.model.parameters())
