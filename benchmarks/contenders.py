"""What folded_network.py compares: one network with its norms held in several ways.

Every contender is a copy of the same network, whose statistics are torch's own averages over a
batch and whose affine parameters are away from their initial values. All compute the same function
but two: in train mode batch statistics take part, and the network without norms has lost those
norms that follow no convolution.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import stillnorm as sn
from support.zoo import images, timm, torchvision

try:
    from mmengine.model import efficient_conv_bn_eval as mmengine
except ImportError:
    mmengine = None

NETWORKS = (
    "torchvision/resnet50",
    "torchvision/mobilenet_v2",
    "torchvision/densenet121",
    "timm/efficientnet_b0",
    "timm/regnety_016",
)
LIMIT = "no norms, by hand"


class LeftOutError(Exception):
    """The contender does not take part, for the reason given."""


@dataclass(frozen=True)
class Contender:
    """A way to hold the norms of a network.

    Args:
        name: What the table calls it.
        make: Changes a network, with an example input, and returns how many norms are computed in
            the convolutions before them.
        is_same_function: Whether the output is that of the network in eval mode.
    """

    name: str
    make: Callable[[nn.Module, Tensor], int]
    is_same_function: bool = True

    def build(self, base: nn.Module, x: Tensor) -> tuple[nn.Module, int]:
        """Return a copy of the network, and how many of its norms are folded.

        Raises:
            LeftOutError: The output is not that of the network in eval mode.
        """
        net = copy.deepcopy(base)
        folded = self.make(net, x)
        with torch.no_grad():
            y, expected = net(x), base(x)
        error = float((y - expected).abs().max() / expected.abs().max())
        if not torch.isfinite(y).all():
            raise LeftOutError("its output is not finite")
        if self.is_same_function and error > 1e-2:
            raise LeftOutError(f"its output is off by {100 * error:.0f} % of the largest")
        return net, folded


def norms_of(net: nn.Module) -> dict[str, _BatchNorm]:
    """Find the batch norms by path."""
    return {path: m for path, m in net.named_modules() if isinstance(m, _BatchNorm)}


def network(name: str, size: int, device: str, layout: torch.memory_format) -> nn.Module:
    """Build a network by the name of its library and its own, calibrated, in eval mode."""
    torch.manual_seed(0)
    library, _, model = name.partition("/")
    make = {"torchvision": torchvision.models.get_model, "timm": timm.create_model}[library]
    net = make(model).to(device, memory_format=layout)
    norms = norms_of(net).values()
    momenta = [norm.momentum for norm in norms]
    with torch.no_grad():
        for norm in norms:
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.normal_(0.0, 0.2)
            norm.momentum = None
        quiet(net)(images(16, seed=1, size=size).to(device, memory_format=layout))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net.eval()


def quiet(net: nn.Module) -> nn.Module:
    """Train mode everywhere but in what draws random numbers: dropout, stochastic depth."""
    net.train()
    for module in net.modules():
        named_so = any(word in type(module).__name__ for word in ("Drop", "StochasticDepth"))
        if named_so or getattr(module, "drop_rate", 0):
            module.training = False
    return net


def _by_hand(net: nn.Module, x: Tensor) -> int:
    """Fold each norm into the convolution before it, whose bias learns; remove the others."""
    pairs, removed = _pairs(net, x), 0
    for path, norm in norms_of(net).items():
        if (convolution := pairs.get(norm)) is None:
            removed += 1
        else:
            convolution.weight, convolution.bias = fuse_conv_bn_weights(
                convolution.weight,
                convolution.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            convolution.bias.requires_grad_()
        rest = [m for m in (getattr(norm, "drop", None), getattr(norm, "act", None)) if m]
        net.set_submodule(path, nn.Sequential(*rest) if rest else nn.Identity())
    return len(pairs)


def _pairs(net: nn.Module, x: Tensor) -> dict[nn.Module, Any]:
    """Find the convolution before each norm, by running the network."""
    outputs: dict[int, tuple[Tensor, nn.Module]] = {}  # kept alive: an id stays one tensor's
    pairs: dict[nn.Module, Any] = {}

    def leave(convolution: nn.Module, args: Any, y: Tensor) -> None:
        outputs[id(y)] = y, convolution

    def enter(norm: nn.Module, args: Any) -> None:
        if id(args[0]) in outputs:
            pairs[norm] = outputs[id(args[0])][1]

    hooks = [m.register_forward_hook(leave) for m in net.modules() if isinstance(m, _ConvNd)]
    hooks += [norm.register_forward_pre_hook(enter) for norm in norms_of(net).values()]
    with torch.no_grad():
        net(x[:1])
    for hook in hooks:
        hook.remove()
    return pairs


def _train(net: nn.Module, x: Tensor) -> int:
    quiet(net)
    return 0


def _eval(affine: str) -> Callable[[nn.Module, Tensor], int]:
    def make(net: nn.Module, x: Tensor) -> int:
        for norm in norms_of(net.eval()).values():
            norm.requires_grad_(affine == "learns")
        return 0

    return make


def _frozen_batch_norm(net: nn.Module, x: Tensor) -> int:
    """Replace the norms by torchvision's, or where they have an activation by timm's."""
    norms = norms_of(net)
    if any(isinstance(norm, timm.layers.BatchNormAct2d) for norm in norms.values()):
        timm.layers.freeze_batch_norm_2d(net)
        return 0
    for path, norm in norms.items():
        frozen = torchvision.ops.FrozenBatchNorm2d(norm.num_features, norm.eps)
        frozen.load_state_dict(norm.state_dict())
        net.set_submodule(path, frozen.to(x.device))
    return 0


def _mmengine(affine: str) -> Callable[[nn.Module, Tensor], int]:
    def make(net: nn.Module, x: Tensor) -> int:
        if mmengine is None:
            raise LeftOutError("mmengine is not installed")
        _eval(affine)(net, x)
        mmengine.turn_on_efficient_conv_bn_eval_for_single_model(net)
        nodes = net.forward.__self__.graph.nodes
        folded = sum(n.target is mmengine.efficient_conv_bn_eval_control for n in nodes)
        if not folded:
            raise LeftOutError("it finds no convolution and norm in the traced network")
        return folded

    return make


def _stillnorm(**options: Any) -> Callable[[nn.Module, Tensor], int]:
    def make(net: nn.Module, x: Tensor) -> int:
        if "fold_when" in options:
            options["fold_on"] = x
        report = sn.freeze(net, strict=True, **options)
        quiet(net)
        return len(report.folded)

    return make


CONTENDERS = (
    Contender(LIMIT, _by_hand, is_same_function=False),
    Contender("train mode", _train, is_same_function=False),
    Contender("eval, affine frozen", _eval("frozen")),
    Contender("eval, affine learns", _eval("learns")),
    Contender("FrozenBatchNorm2d", _frozen_batch_norm),
    Contender("mmengine tune, affine frozen", _mmengine("frozen")),
    Contender("mmengine tune, affine learns", _mmengine("learns")),
    Contender("stillnorm held", _stillnorm()),
    Contender("stillnorm folded, pays", _stillnorm(fold_when="pays")),
    Contender("stillnorm folded, always", _stillnorm(fold_when="always")),
    Contender("stillnorm held, affine learns", _stillnorm(affine="trains")),
    Contender("stillnorm folded, affine learns", _stillnorm(affine="trains", fold_when="pays")),
    Contender("the same, always", _stillnorm(affine="trains", fold_when="always")),
)
