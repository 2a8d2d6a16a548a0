"""Chapter 2, thread 000: momentum 0 taken for a freeze, at batch size 2."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import stillnorm as sn
from stillnorm.calibration import RecalibrationReport
from stillnorm.demo.chapter import Chapter, Track, as_checked, checked, demand_drama
from stillnorm.demo.data import CLASSES, Labelled, digits, scenes
from stillnorm.demo.deeplab import DeepLabV2
from stillnorm.demo.progress import silent
from stillnorm.demo.training import accuracy, mean_iou, train
from stillnorm.diagnosis import Report
from stillnorm.errors import VerifyError
from stillnorm.reports import Bar, Bars, Block, Code, Heading, Line, Quote, Span, Table
from stillnorm.reports.numbers import number, percent

if TYPE_CHECKING:
    import numpy as np

BATCH = 2  # his: "due to the small batch size"
LEARNING_RATE = 0.01

RECIPE = """\
for m in model.modules():
    if isinstance(m, nn.BatchNorm2d):
        m.momentum = 0
        m.weight.requires_grad = False
        m.bias.requires_grad = False
"""

AUDIT = """\
temp = []
critemp = torch.load("bn_para.pt")
def frozen_fn(m):
    classname = m.__class__.__name__
    if classname.find('BatchNorm2d') != -1:
        temp.append([np.average(m.running_mean.data.cpu().numpy()),
              np.average(m.running_var.data.cpu().numpy()),
              np.average(m.weight.data.cpu().numpy()),
              np.average(m.bias.data.cpu().numpy())])
model.apply(frozen_fn)
assert temp == critemp
"""


@dataclass(frozen=True, eq=False)
class ZeroMomentum(Chapter):
    """What was measured; scores are mean IoU on scenes of the second photograph.

    Args:
        pretrained: In eval mode on scenes of the first photograph.
        before: In eval mode before fine-tuning.
        audit_passes: Whether his averages agreed after every step.
        bit_equal: Whether every running mean and variance is bit-equal after fine-tuning.
        objection: What `Snapshot.verify` says to that.
        train_mode: After his fine-tuning, by batch statistics, two scenes at a time.
        eval: The same in eval mode.
        recalibrated: In eval mode after `recalibrate`, without training.
        not_frozen: In eval mode after the same fine-tuning, nothing frozen.
        held: In eval mode after fine-tuning with `freeze` and a tenth of the learning rate.
        held_at_his_rate: The same at his learning rate.
        difference: The largest difference of the held network's outputs in train() and eval().
        found_by_name: How many held layers his loop over class names finds.
        report: What `check` says after his fine-tuning.
        recalibration: What `recalibrate` did.
    """

    pretrained: float
    before: float
    audit_passes: bool
    bit_equal: bool
    objection: str
    train_mode: float
    eval: float
    recalibrated: float
    not_frozen: float
    held: float
    held_at_his_rate: float
    difference: float
    found_by_name: int
    report: Report
    recalibration: RecalibrationReport

    thread = "000"
    title = "Momentum 0 is not frozen"

    def brief(self) -> tuple[Block, ...]:
        """Tell it in a few lines."""
        rows = (
            (
                "his recipe, mean IoU",
                f"train-mode {percent(self.train_mode)}",
                ("eval ", Span(percent(self.eval), "error")),
                "",
            ),
            (
                "sn.recalibrate(net, train_set)",
                "",
                f"eval {percent(self.recalibrated)}",
                f"rescued; known to {number(self.recalibration.standard_error or 0)} sigma",
            ),
            (
                "next time: sn.freeze(net), lr / 10",
                "",
                f"eval {percent(self.held)}",
                f"train() - eval() = {self.difference}",
            ),
            ("the same at his lr", "", f"eval {percent(self.held_at_his_rate)}", ""),
        )
        audit = "passes" if self.audit_passes else "fails"
        return (
            QUOTE,
            Line(
                f"his audit of the averages: {audit}; statistics bit-equal: {_yes(self.bit_equal)}",
                indent=2,
            ),
            Table((), rows, "llll", indent=2),
            Line(f"verify: {self.objection}", indent=2),
            checked(self.report.findings),
        )

    def page(self) -> tuple[Block, ...]:
        """Tell it with code, plots and findings."""
        bars = (
            Bar("before", 100 * self.before, "trained on the other photograph only"),
            Bar("his recipe, train-mode", 100 * self.train_mode, "two scenes at a time"),
            Bar("his recipe, eval", 100 * self.eval, "quite terrible", "error"),
            Bar("recalibrated", 100 * self.recalibrated, "no training"),
            Bar("held, lr / 10", 100 * self.held, "train() and eval() are one function"),
            Bar("held, his lr", 100 * self.held_at_his_rate, "a step that was safe before"),
            Bar("nothing frozen", 100 * self.not_frozen, "for comparison"),
        )
        moved = tuple(
            (layer.path, number(layer.mean_moved), number(layer.var_ratio))
            for layer in self.recalibration.layers
        )
        return (
            QUOTE,
            Line(
                "A small DeepLab-v2 (a ResNet with dilated stages, ASPP of dilated convolutions) "
                "segments digits on stickers, pasted on a photograph. It is trained on one "
                f"photograph in batches of 32 (mean IoU {percent(self.pretrained)}), then "
                "fine-tuned in batches of 2 on another, where the stickers are the negative of "
                "what they were. He freezes the norms in this way:"
            ),
            Code(RECIPE),
            Line("and watches them after every step:"),
            Code(AUDIT),
            Line(
                f"The averages agree after every step: {_yes(self.audit_passes)}. Every running "
                f"mean and variance is bit-equal to the start: {_yes(self.bit_equal)}. Momentum is "
                "the weight of the new batch in the running statistics, and nothing else: in "
                "train mode the layers still normalise by the batch."
            ),
            Bars("mean IoU on scenes of the new photograph", bars, "%"),
            Heading("before.verify(net)", 3),
            Line("A snapshot holds the switches too, not averages of the tensors alone:"),
            Line(Span(self.objection, "strong")),
            Heading("print(sn.check(net, train_set, score=pixel_accuracy))", 3),
            *as_checked(self.report),
            Heading("What recalibration moved", 3),
            Table(("layer", "mean moved (sigma)", "variance x"), moved, "lrr"),
            Heading("What this does not say", 3),
            Line(
                "Freezing is not better training: with nothing frozen the same fine-tuning ends at "
                f"{percent(self.not_frozen)}. Freezing makes train and eval one function, "
                "whatever the batch. And a held network has lost BatchNorm's invariance to the "
                "scale of its weights, so that a step that was safe can be too large: at his "
                f"learning rate it ends at {percent(self.held_at_his_rate)} (thread 002, post 8). "
                "Start at a tenth."
            ),
            Line(
                f"His loop over class names still finds all {self.found_by_name} held layers: a "
                "held layer's class is named `HeldBatchNorm2d`."
            ),
        )

    def numbers(self) -> Mapping[str, float]:
        """Return the measured numbers by name."""
        return {
            "train_mode": self.train_mode,
            "eval": self.eval,
            "recalibrated": self.recalibrated,
            "held": self.held,
            "held_at_his_rate": self.held_at_his_rate,
            "not_frozen": self.not_frozen,
            "train_eval_difference": self.difference,
        }


QUOTE = Quote(
    "I set momentum = 0 for all nn.BatchNorm2d ... when testing, I directly use model.eval() ... "
    "the results are quite terrible",
    "thread 000",
)


def play(
    seed: int = 0, *, pretraining: int = 250, steps: int = 400, track: Track = silent
) -> ZeroMomentum:
    """Fine-tune by his recipe, rescue the network, and fine-tune it again with held norms.

    Args:
        seed: Of everything random.
        pretraining: Steps at batch size 32.
        steps: Steps of fine-tuning at batch size 2.
        track: Shows the progress.

    Raises:
        StillnormError: Eval is within five points of train mode.
    """
    known, new = digits(seed)
    start = _pretrained(known, pretraining, seed, track)
    elsewhere = scenes("china.jpg", new, 128, columns=(0.97, 1), negative=False, seed=seed + 1)
    train_set = scenes("flower.jpg", known, 600, columns=(0, 0.7), negative=True, seed=seed + 2)
    test_set = scenes("flower.jpg", new, 128, columns=(0.95, 1), negative=True, seed=seed + 3)
    order = train_set.shuffled(BATCH, steps, seed)

    def tune(net: nn.Module, rate: float, what: str) -> nn.Module:
        _fine_tune(net.train(), train_set, track(order, what), rate)
        return net

    net = copy.deepcopy(start)
    zero_momentum(net)
    before = sn.snapshot(net)
    audit = Audit(net)
    _fine_tune(net.train(), train_set, audit.after(track(order, "his recipe")), LEARNING_RATE)
    with sn.preserved(net):
        train_mode = _score(net.train(), test_set, BATCH)
    with sn.eval_mode(net):
        eval_ = _score(net, test_set)
    demand_drama(ZeroMomentum.thread, "train-mode and eval mean IoU", train_mode, eval_)
    report = sn.check(net, train_set.batches(BATCH), score=accuracy, max_batches=32)
    objection = _objection(before, net)
    moved = {change.tensor for change in before.diff(net).changes if hasattr(change, "tensor")}
    recalibration = sn.recalibrate(net, track(train_set.batches(BATCH), "recalibrating"))

    held, too_fast = copy.deepcopy(start), copy.deepcopy(start)
    sn.freeze(held)
    sn.freeze(too_fast)
    frozen = sn.snapshot(held)
    tune(held, LEARNING_RATE / 10, "held, lr / 10")
    frozen.verify(held)
    return ZeroMomentum(
        pretrained=_score(start.eval(), elsewhere),
        before=_score(start, test_set),
        audit_passes=audit.passes,
        bit_equal=not moved & {"running_mean", "running_var"},
        objection=objection,
        train_mode=train_mode,
        eval=eval_,
        recalibrated=_score(net.eval(), test_set),
        not_frozen=_score(
            tune(copy.deepcopy(start), LEARNING_RATE, "nothing frozen").eval(), test_set
        ),
        held=_score(held.eval(), test_set),
        held_at_his_rate=_score(tune(too_fast, LEARNING_RATE, "held, his lr").eval(), test_set),
        difference=_difference(held, test_set.x[:16]),
        found_by_name=len(averages(held)),
        report=report,
        recalibration=recalibration,
    )


def zero_momentum(net: nn.Module) -> None:
    """Freeze norms as he does."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0
            module.weight.requires_grad = False
            module.bias.requires_grad = False


def averages(net: nn.Module) -> list[list[np.floating]]:
    """Return what he compares: of each layer the averages of its four tensors."""
    import numpy as np

    temp: list[list[np.floating]] = []

    def frozen_fn(m: Any) -> None:
        if m.__class__.__name__.find("BatchNorm2d") != -1:
            tensors = (m.running_mean, m.running_var, m.weight, m.bias)
            temp.append([np.average(t.detach().cpu().numpy()) for t in tensors])

    net.apply(frozen_fn)
    return temp


class Audit:
    """His comparison of averages with those at the start, after every step."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.criterion = averages(net)
        self.passes = True

    def after(self, steps: Iterable[Tensor]) -> Iterator[Tensor]:
        """Pass steps on and compare after each."""
        for step in steps:
            yield step
            self.passes = self.passes and averages(self.net) == self.criterion


def _pretrained(known: Labelled, steps: int, seed: int, track: Track) -> nn.Module:
    data = scenes("china.jpg", known, 1600, columns=(0, 0.75), negative=False, seed=seed)
    torch.manual_seed(seed)
    net = DeepLabV2(CLASSES)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    schedule = OneCycleLR(optimizer, 5e-3, total_steps=steps)
    train(net, data, track(data.shuffled(32, steps, seed), "pretraining"), optimizer, schedule)
    return net


def _fine_tune(net: nn.Module, data: Labelled, steps: Iterable[Tensor], rate: float) -> None:
    learning = [p for p in net.parameters() if p.requires_grad]
    train(net, data, steps, torch.optim.SGD(learning, rate, momentum=0.9, weight_decay=5e-4))


def _score(net: nn.Module, data: Labelled, size: int = 16) -> float:
    return mean_iou(net, data, size, CLASSES)


def _objection(before: sn.Snapshot, net: nn.Module) -> str:
    """Return what `verify` raises."""
    try:
        before.verify(net)
    except VerifyError as error:
        return error.fact
    return "no objection"


@torch.no_grad()
def _difference(net: nn.Module, x: Tensor) -> float:
    """Return the largest difference between the outputs in train() and in eval()."""
    return float((net.train()(x) - net.eval()(x)).abs().max())


def _yes(fact: bool) -> str:
    return "yes" if fact else "no"
