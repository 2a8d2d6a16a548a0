"""Chapter 5, thread 001: momentum the other way round, half precision, freezing by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

import stillnorm as sn
from stillnorm.demo.chapter import Chapter, Track, checked, demand_drama
from stillnorm.demo.data import Labelled, digits
from stillnorm.demo.progress import silent
from stillnorm.demo.samples import histogram
from stillnorm.demo.training import accuracy, measured_accuracy, train
from stillnorm.diagnosis import Report
from stillnorm.reports import Bar, Bars, Block, Code, Heading, Histogram, Line, Quote, Span, Table
from stillnorm.reports.numbers import number, percent

BATCH = 8
KERAS, TORCH = 0.99, 0.01  # one convention's number, and the same in the other
HIDDEN, WIDTH = 8, 32


class Net(nn.Module):
    """The tutorial network of the thread: linear, norm, tanh, several times over."""

    def __init__(self, do_bn: bool, momentum: float) -> None:
        super().__init__()
        self.do_bn = do_bn
        self.fcs = nn.ModuleList(nn.Linear(WIDTH if i else 64, WIDTH) for i in range(HIDDEN))
        self.bns = nn.ModuleList(
            nn.BatchNorm1d(WIDTH, momentum=momentum) for _ in range(HIDDEN if do_bn else 0)
        )
        self.predict = nn.Linear(WIDTH, 10)
        for fc in self.fcs:  # as the tutorial has it, to make the layers' inputs go wrong
            nn.init.normal_(fc.get_parameter("weight"), 0.0, 0.1)
            nn.init.constant_(fc.get_parameter("bias"), -0.2)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the class scores and the input of every layer."""
        layer_inputs = [x]
        for i, fc in enumerate(self.fcs):
            x = fc(x)
            if self.do_bn:
                x = self.bns[i](x)
            x = torch.tanh(x)
            layer_inputs.append(x)
        return self.predict(x), layer_inputs


class FreezingNet(Net):
    """The thread's recipe: `train()` overridden, with a flag."""

    freeze_bn = True

    def train(self, mode: bool = True) -> FreezingNet:
        """Set the modes, the norms' to eval."""
        super().train(mode)
        if self.freeze_bn:
            for m in self.modules():
                if isinstance(m, nn.BatchNorm1d):
                    m.eval()
        return self


class FrozenByFormula(nn.Module):
    """What torchvision's FrozenBatchNorm2d computes: ``x * scale + bias``, scale in float32."""

    def __init__(self, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        for name, tensor in (*bn.named_parameters(), *bn.named_buffers()):
            self.register_buffer(name, tensor.detach().clone())
        self.eps = bn.eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised (N, C, H, W)."""
        w, b, rv, rm = (
            self.get_buffer(name).reshape(1, -1, 1, 1)
            for name in ("weight", "bias", "running_var", "running_mean")
        )
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


@dataclass(frozen=True)
class Half:
    """One frozen layer on float16 inputs.

    Args:
        layer: Which.
        dtype: The dtype of its output.
        saved: The bytes that it and the ReLU after it keep for backward.
    """

    layer: str
    dtype: str
    saved: int


@dataclass(frozen=True, eq=False)
class Conventions(Chapter):
    """What was measured.

    Args:
        train_mode: Accuracy by batch statistics with momentum 0.99.
        keras: In eval mode with momentum 0.99, copied from Keras.
        torch: In eval mode with the same training and momentum 0.01.
        report: What `check` says of the former.
        moved: How far one forward under no_grad in train mode moved a running mean, at most.
        held_by: What `inspect` says holds the layers of a network whose `train()` is overridden.
        thawed_by_child: Whether `train()` on such a layer itself thaws it.
        restored: Whether `eval_mode` gave every module the mode that it had.
        halves: Frozen layers on float16 inputs.
        with_norm: The layer inputs with BatchNorm.
        without_norm: The layer inputs without.
    """

    train_mode: float
    keras: float
    torch: float
    report: Report
    moved: float
    held_by: str
    thawed_by_child: bool
    restored: bool
    halves: tuple[Half, ...]
    with_norm: Histogram
    without_norm: Histogram

    thread = "001"
    title = "Momentum the other way round, and half precision"

    def brief(self) -> tuple[Block, ...]:
        """Tell it in a few lines."""
        foreign, ours = self.halves
        rows: tuple[tuple[Any, ...], ...] = (
            ("momentum 0.99, as in Keras", ("eval ", Span(percent(self.keras), "error"))),
            ("momentum 0.01, what it means here", f"eval {percent(self.torch)}"),
            (
                "one forward under no_grad, train mode",
                f"running_mean moved by {number(self.moved)}",
            ),
            ("train() overridden with a freeze flag", f"inspect: held by {self.held_by}"),
            (
                f"float16 into {foreign.layer}",
                f"{foreign.dtype} out, {foreign.saved / ours.saved:.1f}x saved bytes",
            ),
            (f"float16 into {ours.layer}", f"{ours.dtype} out"),
        )
        return (QUOTE, Table((), rows, "ll", indent=2, gap=3), checked(self.report.findings))

    def page(self) -> tuple[Block, ...]:
        """Tell it with plots and findings."""
        bars = (
            Bar("batch statistics", 100 * self.train_mode, "as trained, batches of 8"),
            Bar("momentum 0.99", 100 * self.keras, "the last batches decide", "error"),
            Bar("momentum 0.01", 100 * self.torch, "the same training"),
        )
        half = Table(
            ("frozen layer", "output", "saved for backward, bytes"),
            tuple((h.layer, h.dtype, f"{h.saved:,}") for h in self.halves),
            "llr",
        )
        return (
            QUOTE,
            Bars("accuracy on 360 test digits, eval mode", bars, "%"),
            checked(self.report.findings),
            Line(
                "torch's momentum is the weight of the new batch, Keras's and TensorFlow's that of "
                "the old average: 0.99 there is 0.01 here. The statistics are updated in the "
                "forward, not in backward or step: one forward under torch.no_grad() in train mode "
                f"moved a running mean by {number(self.moved)}."
            ),
            Heading("What each layer receives, with BatchNorm and without", 3),
            self.with_norm,
            self.without_norm,
            Heading("Half precision", 3),
            Line("One frozen layer and a ReLU, 8 x 64 x 28 x 28 in float16, affine frozen."),
            half,
            Heading("Freezing by an overridden train()", 3),
            Line(
                f"inspect says what holds the layers: {self.held_by}. It lasts through "
                "model.train(); train() on the layer itself "
                f"{'thaws it' if self.thawed_by_child else 'does not thaw it'}. For the plot in "
                "the middle of training there is"
            ),
            Code("with sn.eval_mode(net):\n    pred, layer_inputs = net(test_x)"),
            Line(
                "after which every module has the mode that it had: "
                f"{'yes' if self.restored else 'no'}."
            ),
        )

    def numbers(self) -> Mapping[str, float]:
        """Return the measured numbers by name."""
        foreign, ours = self.halves
        return {
            "train_mode": self.train_mode,
            "keras": self.keras,
            "torch": self.torch,
            "moved": self.moved,
            "saved_ratio": foreign.saved / ours.saved,
        }


QUOTE = Quote(
    "Momentum smoothing of the BN layer in Pytorch is computed in the opposite way ... "
    "RuntimeError: expected scalar type Half but found Float",
    "thread 001",
)


def play(seed: int = 0, *, epochs: int = 4, track: Track = silent) -> Conventions:
    """Train the tutorial's network with either momentum, and look at what the thread asks.

    Raises:
        StillnormError: Eval with momentum 0.99 is within five points of 0.01.
    """
    train_set, test_set = (_flat(data) for data in digits(seed))
    nets = {}
    for momentum in track((KERAS, TORCH), "training with either momentum"):
        nets[momentum] = _trained(Net(True, momentum), train_set, seed, epochs)
    plain = _trained(Net(False, TORCH), train_set, seed, epochs)
    scores = {m: measured_accuracy(net.eval(), test_set, BATCH) for m, net in nets.items()}
    demand_drama(
        Conventions.thread, "eval with momentum 0.01 and 0.99", scores[TORCH], scores[KERAS]
    )
    wrong = nets[KERAS]
    with sn.preserved(wrong):
        train_mode = measured_accuracy(wrong.train(), test_set, BATCH)
    report = sn.check(wrong, train_set.batches(BATCH)[:8], score=accuracy)
    held_by, thawed = _overridden()
    with sn.eval_mode(nets[TORCH]), sn.eval_mode(plain), torch.no_grad():
        with_norm = nets[TORCH](test_set.x)[1]
        without_norm = plain(test_set.x)[1]
    return Conventions(
        train_mode=train_mode,
        keras=scores[KERAS],
        torch=scores[TORCH],
        report=report,
        moved=_moved_under_no_grad(nets[TORCH], test_set.x),
        held_by=held_by,
        thawed_by_child=thawed,
        restored=_modes_come_back(nets[TORCH]),
        halves=tuple(_halves()),
        with_norm=_inputs("with BatchNorm", with_norm),
        without_norm=_inputs("without", without_norm),
    )


def _flat(data: Labelled) -> Labelled:
    return Labelled(data.x.flatten(1), data.y)


def _trained(net: Net, data: Labelled, seed: int, epochs: int) -> Net:
    torch.manual_seed(seed)
    for fc in net.fcs:
        nn.init.normal_(fc.get_parameter("weight"), 0.0, 0.1)
    steps = data.shuffled(BATCH, epochs * (len(data) // BATCH), seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = OneCycleLR(optimizer, 1e-2, total_steps=len(steps))
    train(net.train(), data, [i for i in steps if len(i) > 1], optimizer, schedule)
    return net


def _moved_under_no_grad(net: Net, x: Tensor) -> float:
    """Measure how far one forward under no_grad moves the first running mean."""
    with sn.preserved(net), torch.no_grad():
        mean = net.bns[0].get_buffer("running_mean")
        before = mean.clone()
        net.train()(x[:BATCH])
        return float((mean - before).abs().max())


def _modes_come_back(net: Net) -> bool:
    """Single out a layer, run a block in eval mode, and compare every mode."""
    net.train()
    net.bns[0].eval()
    before = [m.training for m in net.modules()]
    with sn.eval_mode(net):
        pass
    return [m.training for m in net.modules()] == before


def _overridden() -> tuple[str, bool]:
    """Ask what holds the thread's own frozen network, and thaw one of its layers by name."""
    net = FreezingNet(True, TORCH)
    held_by = sn.inspect(net).layers[0].held or "nothing"
    net.train()
    net.bns[0].train()
    return held_by, net.bns[0].training


def _halves() -> Iterator[Half]:
    """Compare frozen layers on float16 inputs, each with the ReLU after it."""
    bn = nn.BatchNorm2d(64)
    bn.get_buffer("running_mean").normal_()
    bn.get_buffer("running_var").uniform_(0.5, 2)
    held = nn.BatchNorm2d(64)
    held.load_state_dict(bn.state_dict())
    sn.freeze(held)
    x = torch.randn(8, 64, 28, 28, dtype=torch.float16, requires_grad=True)
    layers = {"torchvision's frozen layer": FrozenByFormula(bn), "a layer held by stillnorm": held}
    for name, layer in layers.items():
        kept: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = F.relu(layer(x))
        yield Half(name, str(y.dtype).removeprefix("torch."), sum(kept.values()))


def _inputs(title: str, inputs: list[Tensor]) -> Histogram:
    return histogram(title, {f"layer {i}": values for i, values in enumerate(inputs[1:], start=1)})
