"""Chapter 3, thread 002: what a batch norm does in backward, frozen and not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import stillnorm as sn
from stillnorm.demo.chapter import Chapter, Track, as_checked, checked
from stillnorm.demo.deeplab import BasicBlock
from stillnorm.demo.progress import silent
from stillnorm.diagnosis import Report
from stillnorm.norms import find_norms
from stillnorm.reports import Block, Code, Heading, Line, Quote, Table
from stillnorm.reports.numbers import number

CHANNELS = 64

LOOP = """\
net.train()
for module in net.modules():
    if isinstance(module, torch.nn.modules.BatchNorm2d):
        module.eval()
"""

HIS_RESULTS = (0.8908671140670776, 0.8908671140670776, 0.0, 1.646934677523859e-08, 0.0)

Hold = Literal["", "trains", "frozen"]


@dataclass(frozen=True, eq=False)
class Case:
    """One way to call the layer, and what came of it.

    Args:
        name: What it is.
        by_sum: The gradient of his loss, a sum, with respect to the input.
        by_random: The gradient of a randomly weighted sum.
        mean_moved: How far running_mean moved, at most.
        weight_learns: Whether a gradient reached the weight.
        normalizes_by: ``"batch"`` or ``"running"``.
    """

    name: str
    by_sum: Tensor
    by_random: Tensor
    mean_moved: float
    weight_learns: bool
    normalizes_by: str

    def row(self) -> tuple[str, ...]:
        """Return the case as a row: gradients by their largest element."""
        return (
            self.name,
            number(_largest(self.by_sum)),
            number(_largest(self.by_random)),
            number(self.mean_moved),
            "yes" if self.weight_learns else "no",
            self.normalizes_by,
        )


HEADER = ("", "d input, sum()", "d input, random", "running_mean moved", "learns", "uses")


@dataclass(frozen=True, eq=False)
class Gradients(Chapter):
    """What was measured.

    Args:
        his: His five layers, BN0 to BN4.
        held: The same layer held by `freeze` and called in train mode, affine learning and frozen.
        held_from_eval: The largest difference between the held layer's gradient to the input and
            that of a layer in eval mode.
        report: What `check` says of the loop that sets norms to eval after `train()`.
    """

    his: tuple[Case, ...]
    held: tuple[Case, ...]
    held_from_eval: float
    report: Report

    thread = "002"
    title = "Frozen statistics, learning weights"

    def brief(self) -> tuple[Block, ...]:
        """Tell it in a few lines."""
        rows = tuple(case.row() for case in (*self.his, *self.held))
        return (
            QUOTE,
            Table(HEADER, rows, "lrrrll", indent=2),
            Line(
                f"held in train mode against eval: gradients differ by {self.held_from_eval:.1g}",
                indent=2,
            ),
            checked(self.report.findings),
        )

    def page(self) -> tuple[Block, ...]:
        """Tell it with code, formulas and findings."""
        pairs = ("BN2 - BN1", "BN4 - BN3", "BN4 - BN2", "BN3 - BN1", "BN1 - BN0")
        now = zip(pairs, HIS_RESULTS, self.differences(), strict=True)
        return (
            QUOTE,
            Line(
                "His five layers, with his sizes, and two more that stillnorm holds. His loss is a "
                "plain sum, and in train mode the outputs of a batch norm add up to a constant: "
                "its gradient is zero but for rounding, whatever the layer does. A randomly "
                "weighted sum shows what it does."
            ),
            Table(HEADER, tuple(case.row() for case in (*self.his, *self.held)), "lrrrll"),
            Line(
                "The flag that he looks for is `training`: normalising by the batch, mean and "
                "variance depend on the input, and their gradients are part of the input's:"
            ),
            Code(
                "running  dx = weight / sqrt(running_var + eps) * dy\n"
                "batch    dx = weight / sqrt(var + eps)\n"
                "              * (dy - mean(dy) - x_hat * mean(dy * x_hat))",
                "text",
            ),
            Line(
                "Without affine parameters the statistics move all the same: `affine=False` "
                f"moved running_mean by {number(self.his[3].mean_moved)}. What he wants, "
                "statistics fixed and weight and bias learning, is one call; the layer then has "
                "the gradients of eval mode in train mode:"
            ),
            Code('sn.freeze(bn, affine="trains")'),
            Heading("The differences that he prints", 3),
            Table(
                ("", "then", "now", "now, random"),
                tuple(
                    (name, number(then), number(by_sum), number(by_random))
                    for name, then, (by_sum, by_random) in now
                ),
                "lrrr",
            ),
            Heading("The loop of post 8", 3),
            Code(LOOP),
            Line("It works until something calls `net.train()` again."),
            Heading("print(sn.check(net))", 3),
            *as_checked(self.report),
        )

    def differences(self) -> tuple[tuple[float, float], ...]:
        """Return his five differences of gradients, for the sum and for the random weights."""
        pairs = ((2, 1), (4, 3), (4, 2), (3, 1), (1, 0))
        return tuple(
            (
                _largest(self.his[i].by_sum - self.his[j].by_sum),
                _largest(self.his[i].by_random - self.his[j].by_random),
            )
            for i, j in pairs
        )

    def numbers(self) -> Mapping[str, float]:
        """Return the measured numbers by name."""
        return {
            "train_sum": _largest(self.his[1].by_sum),
            "train_random": _largest(self.his[1].by_random),
            "eval_sum": _largest(self.his[2].by_sum),
            "eval_random": _largest(self.his[2].by_random),
            "moved_affine_false": self.his[3].mean_moved,
            "moved_held": max(case.mean_moved for case in self.held),
            "held_from_eval": self.held_from_eval,
        }


QUOTE = Quote(
    "calculation of bottom_grad in BN will be different ... we do not find any flag ... to mark "
    "this difference",
    "thread 002",
)


def play(seed: int = 0, *, side: int = 100, track: Track = silent) -> Gradients:
    """Measure the gradients of his five layers and of held ones, and check the loop of post 8.

    Args:
        seed: Of everything random.
        side: Height and width of the input.
        track: Shows the progress.
    """
    torch.manual_seed(seed)
    x, mean, var = _his_input(side)
    weights = torch.randn_like(x)

    def case(name: str, *, affine: bool, train: bool, learns: bool = True, hold: Hold = "") -> Case:
        gradients = []
        for cotangent in (torch.ones_like(x), weights):
            bn = nn.BatchNorm2d(CHANNELS, affine=affine).train(train)
            bn.load_state_dict({"running_mean": mean, "running_var": var}, strict=False)
            if not learns:
                bn.requires_grad_(False)
            if hold:
                sn.freeze(bn, affine=hold)
                bn.train()
            leaf = x.clone().requires_grad_()
            bn(leaf).backward(cotangent)
            gradients.append(torch.as_tensor(leaf.grad))
        (layer,) = find_norms(bn)
        return Case(
            name=name,
            by_sum=gradients[0],
            by_random=gradients[1],
            mean_moved=_largest(torch.as_tensor(bn.running_mean) - mean),
            weight_learns=bn.weight is not None and bn.weight.grad is not None,
            normalizes_by=layer.normalizes_by(bn.training),
        )

    his = (
        case("BN0 train, affine frozen", affine=True, train=True, learns=False),
        case("BN1 train", affine=True, train=True),
        case("BN2 eval", affine=True, train=False),
        case("BN3 train, affine=False", affine=False, train=True),
        case("BN4 eval, affine=False", affine=False, train=False),
    )
    held = (
        case("held, affine trains; train", affine=True, train=True, hold="trains"),
        case("held; train", affine=True, train=True, hold="frozen"),
    )
    return Gradients(
        his=his,
        held=held,
        held_from_eval=max(_largest(case.by_random - his[2].by_random) for case in held),
        report=sn.check(_set_to_eval()),
    )


def _his_input(side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input, running mean and running variance of his script."""
    x = torch.rand(1, CHANNELS, side, side) * 100
    return x, torch.rand(CHANNELS) * 100, torch.rand(CHANNELS) * 100


def _set_to_eval() -> nn.Module:
    """Return a network after a forward in train mode and the loop of post 8."""
    net = nn.Sequential(BasicBlock(3, 8), BasicBlock(8, 8))
    net(torch.randn(4, 3, 8, 8))
    for module in net.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return net


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())
