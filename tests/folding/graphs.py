"""Random networks around convolutions and norms, and the unusual things that programs do there.

Everything is drawn from one source of choices, which can be replayed: two networks built from the
same choices are equal to the last bit and share nothing. The first option is always the simplest.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from folding.graph_layers import Choices, fits, make_convolution, make_norm, settle
from folding.graph_quirks import BETWEEN, CONSUMERS, QUIRKS, Block, Net

T = TypeVar("T")


# ------------------------------------------------------------------- hooks and parametrizations


class Recorder:
    """A hook that keeps copies of what it sees, and may change it."""

    def __init__(self, factor: float | None) -> None:
        self.factor = factor
        self.seen: list[Tensor] = []

    def __call__(self, module: nn.Module, *seen: Any) -> Any:
        for values in seen:
            for value in values if isinstance(values, tuple) else (values,):
                if isinstance(value, Tensor):
                    self.seen.append(value.detach().clone())
        if self.factor is None:
            return None
        last = seen[0] if self.kind in ("full_backward", "forward_pre") else seen[-1]
        if isinstance(last, tuple):
            return tuple(None if v is None else v * self.factor for v in last)
        return last * self.factor

    kind = ""


@dataclass(frozen=True)
class Attach:
    """Registers a hook or a parametrization on a layer."""

    path: str
    what: str
    factor: float | None = None

    def __call__(self, net: nn.Module) -> None:
        layer: Any = net.get_submodule(self.path)
        if self.what == "weight_norm":
            nn.utils.parametrizations.weight_norm(layer)
        elif self.what == "old weight_norm":
            nn.utils.weight_norm(layer)
        else:
            recorder = Recorder(self.factor)
            recorder.kind = self.what
            getattr(layer, f"register_{self.what}_hook")(recorder)


HOOKS = ("forward_pre", "forward", "full_backward", "full_backward_pre")
PARAMETRIZATIONS = ("weight_norm", "old weight_norm")


def recorders(net: nn.Module) -> list[Recorder]:
    return [
        hook
        for module in net.modules()
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
        for hook in hooks.values()
        if isinstance(hook, Recorder)
    ]


# ---------------------------------------------------------------------------------- the network


@dataclass
class Case:
    """A network, its inputs, and what is to be registered before it is frozen and after.

    Args:
        net: The network, in float64.
        xs: Its inputs; the first is the example.
        early: What is registered before freezing.
        late: What is registered after.
        tags: What it has, for statistics.
    """

    net: Net
    xs: list[Tensor]
    early: list[Attach] = field(default_factory=list)
    late: list[Attach] = field(default_factory=list)
    tags: set[str] = field(default_factory=set)

    def has(self, what: str) -> bool:
        return any(attach.what == what for attach in (*self.early, *self.late))

    @property
    def quirks(self) -> list[str]:
        return [block.quirk for block in self.net.blocks]

    @property
    def is_checkpointed(self) -> bool:
        return any("checkpoint" in quirk for quirk in self.quirks)


SIZES = {-1: (3,), 0: (), 1: (6,), 2: (5, 4), 3: (3, 4, 3)}


def draw_case(pick: Choices, smooth: bool = False) -> Case:
    """Draw a network.

    Args:
        pick: The choices.
        smooth: Activations without kinks only.
    """
    torch.manual_seed(pick.of(range(64)))
    rank = pick.of((2, 1, 3, 0, -1))
    channels = pick.of((4, 6))
    n = pick.of((2, 3))
    size = list(SIZES[rank])
    if rank == -1 and pick.rarely(2):
        size = [channels]  # then a norm over the wrong dimension fits, too
    shape = (n, *size, channels) if rank == -1 else (n, channels, *size)
    xs = [torch.randn(shape, dtype=torch.float64) for _ in range(4)]
    if rank == 2 and pick.rarely(4):
        xs = [x.contiguous(memory_format=torch.channels_last) for x in xs]

    blocks: list[Block] = []
    case = Case(Net([], []), xs)
    c, activations = channels, []
    for i in range(pick.of((1, 2, 3))):
        out = pick.of((c, c, 4, 6))
        arrange = pick.of(("transpose", "flatten", "direct")) if rank == -1 else ""
        over = size[0] if arrange == "direct" else out
        norm_rank = 0 if arrange == "flatten" else 1 if arrange else rank
        layers = {
            "conv": make_convolution(pick, rank, c, out, size),
            "norm": make_norm(pick, norm_rank, over),
        }
        _share(pick, layers, blocks, (c, out), over, norm_rank, size)
        quirk = pick.of(("", *QUIRKS)) if pick.rarely(2) else ""
        detail = ""
        if "consumer" in quirk:
            detail = pick.of(tuple(CONSUMERS))
        elif quirk == "between":
            detail = pick.of(tuple(BETWEEN))
        if quirk.startswith(("two", "cross", "exch", "sum", "the_other")):
            layers["norm2"] = make_norm(pick, norm_rank, over)
            layers["conv2"] = _twin(layers["conv"])
        when = pick.of(("always", "later", "example")) if quirk else "always"
        reentrant = pick.of((False, True)) if "checkpoint" in quirk else False
        blocks.append(Block(layers, quirk, detail, when, arrange, reentrant))
        kinds = ("", "tanh", "sigmoid") if smooth else ("", "relu", "tanh", "relu_")
        activations.append(pick.of(kinds))
        if pick.rarely(4):
            _attach(pick, case, i, blocks)
        if pick.rarely(12):
            layers["conv"].weight.requires_grad_(False)
        c = out
        if rank > 0:
            with torch.no_grad():
                size = list(layers["conv"](torch.zeros(1, layers["conv"].in_channels, *size)).shape)
                size = size[2:]
    case.net = Net(blocks, activations).double()
    settle(case.net)
    for attach in case.early:
        attach(case.net)
    _tag(case, rank)
    return case


def _twin(conv: nn.Module) -> nn.Module:
    """Another convolution of the same geometry."""
    options = {"bias": conv.bias is not None}
    if isinstance(conv, nn.Linear):
        return type(conv)(conv.in_features, conv.out_features, **options)
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    options |= {name: getattr(conv, name) for name in names}
    if hasattr(conv, "output_padding") and conv.transposed:
        options["output_padding"] = conv.output_padding
    return type(conv)(conv.in_channels, conv.out_channels, **options)


def _share(
    pick: Choices,
    layers: dict[str, nn.Module],
    blocks: list[Block],
    channels: tuple[int, int],
    over: int,
    norm_rank: int,
    size: list[int],
) -> None:
    """Take the convolution, the norm or both from an earlier block, where they fit."""
    if not blocks or not pick.rarely(4):
        return
    other = pick.of(blocks)
    what = pick.of(("norm", "conv", "both"))
    norm = other.norm
    if what != "conv" and norm.num_features == over and _takes(norm, norm_rank):
        layers["norm"] = norm
    conv = other.conv
    if what == "norm" or not isinstance(conv, nn.Linear | nn.modules.conv._ConvNd):
        return
    if isinstance(conv, nn.Linear):
        if (conv.in_features, conv.out_features) == channels:
            layers["conv"] = conv
    elif (conv.in_channels, conv.out_channels) == channels and fits(conv, channels[0], size):
        layers["conv"] = conv


def _takes(norm: nn.Module, rank: int) -> bool:
    """Whether the norm takes inputs of that many positions."""
    if isinstance(norm, nn.SyncBatchNorm):
        return True
    if rank == 0:
        return isinstance(norm, nn.BatchNorm1d)
    kinds = getattr(nn, f"BatchNorm{rank}d"), getattr(nn, f"InstanceNorm{rank}d")
    return isinstance(norm, kinds)


def _attach(pick: Choices, case: Case, i: int, blocks: list[Block]) -> None:
    what = pick.of((*HOOKS, *PARAMETRIZATIONS))
    layer = pick.of(("conv", "norm")) if what in HOOKS else "conv"
    factor = pick.of((None, 1.5)) if what in HOOKS else None
    attach = Attach(f"blocks.{i}.{layer}", what, factor)
    if what in PARAMETRIZATIONS:
        if any(a.what in PARAMETRIZATIONS for a in (*case.early, *case.late)):
            return
        if any(block.conv is blocks[i].conv for block in blocks[:i]):
            return
    (case.late if pick.rarely(2) else case.early).append(attach)


def _tag(case: Case, rank: int) -> None:
    for block in case.net.blocks:
        conv, norm = block.conv, block.norm
        case.tags |= {f"rank {rank}", f"quirk {block.quirk}:{block.detail}:{block.when}"}
        case.tags |= {f"conv {type(conv).__name__}", f"norm {type(norm).__name__}"}
