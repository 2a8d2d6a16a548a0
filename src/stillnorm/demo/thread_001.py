"""Chapter 5, thread 001: momentum the other way round, updates in forward, half precision."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

import stillnorm as sn
from stillnorm.demo.chapter import Chapter, Track, as_checked, checked, demand_drama
from stillnorm.demo.data import Labelled, digits
from stillnorm.demo.half import Frozen, half_error, under_autocast
from stillnorm.demo.plotted import PlottedNet, layer_inputs
from stillnorm.demo.progress import silent
from stillnorm.demo.samples import histogram
from stillnorm.demo.training import measured_accuracy, train
from stillnorm.diagnosis import Report
from stillnorm.reports import (
    Bar,
    Bars,
    Block,
    Code,
    Heading,
    Histogram,
    Line,
    Quote,
    Span,
    Table,
    Text,
)
from stillnorm.reports.numbers import count, number, percent, size

BATCH = 8
KERAS = 0.99  # the default of Keras, where momentum is the weight of the old value
TORCH = 0.01  # the same in torch, where it is that of the new batch

LOOP = """\
for epoch in range(EPOCH):
    net.eval()             # set eval mode to fix moving_mean and moving_var
    pred, layer_input, pre_act = net(test_x)
    net.train()            # free moving_mean and moving_var
    plot_histogram(...)
"""


class MyNet(PlottedNet):
    """The network with the `train()` that the post recommends."""

    freeze_bn = True
    freeze_bn_affine = True

    def train(self, mode: bool = True) -> MyNet:
        """Train, and freeze the norms again."""
        super().train(mode)
        if self.freeze_bn:
            for m in self.modules():
                if isinstance(m, nn.BatchNorm1d):
                    m.eval()
                    if self.freeze_bn_affine:
                        m.weight.requires_grad = False
                        m.bias.requires_grad = False
        return self


@dataclass(frozen=True, eq=False)
class Conventions(Chapter):
    """What was measured.

    Args:
        keras_momentum: Accuracy in eval mode, trained with momentum 0.99.
        torch_momentum: The same with momentum 0.01.
        same_weights: Whether all parameters of the two are bit-equal.
        without_norms: Accuracy of the network without norms, trained the same way.
        moved_without_gradient: How far running_mean moved in one forward under no_grad, at most.
        thawed_by_loop: Of how many layers set to eval his loop puts back into train mode.
        thawed_by_eval_mode: The same with `sn.eval_mode` in its place.
        held_by: What `inspect` says holds the layers of a network with its own `train()`.
        half_error: What torch says to half weights beside float32 statistics.
        frozen: Frozen layers under autocast.
        report: What `check` says of momentum 0.99.
        inputs: What enters the layers before training, with and without norms.
        spread_with: The deviation over the test digits of what enters the last layer, with norms.
        spread_without: The same without them.
    """

    keras_momentum: float
    torch_momentum: float
    same_weights: bool
    without_norms: float
    moved_without_gradient: float
    thawed_by_loop: int
    thawed_by_eval_mode: int
    held_by: str
    half_error: str
    frozen: tuple[Frozen, ...]
    report: Report
    inputs: tuple[Histogram, ...]
    spread_with: float
    spread_without: float

    thread = "001"
    title = "Conventions that bite"

    def brief(self) -> tuple[Block, ...]:
        """Tell it in a few lines."""
        bit_equal = "bit-equal" if self.same_weights else "other"
        rows: tuple[tuple[Text, ...], ...] = (
            (
                "momentum 0.99, from Keras",
                ("eval ", Span(percent(self.keras_momentum), "error")),
                f"0.01: eval {percent(self.torch_momentum)}, {bit_equal} weights",
            ),
            (
                "a forward under no_grad",
                f"moves running_mean by {number(self.moved_without_gradient)}",
                "statistics move in forward",
            ),
            (
                "eval(), plot, train()",
                f"thaws {count(self.thawed_by_loop, 'layer')}",
                f"with sn.eval_mode(net): {self.thawed_by_eval_mode}",
            ),
            ("a train() of one's own", f"holds: {self.held_by}", "seen by sn.inspect"),
            *(
                (f"half, {layer.name}", f"{layer.dtype} out", f"{size(layer.saved_bytes)} saved")
                for layer in self.frozen
            ),
        )
        return (QUOTE, Table((), rows, "lll", indent=2), checked(self.report.findings))

    def page(self) -> tuple[Block, ...]:
        """Tell it with code, plots and findings."""
        accuracies = (
            Bar("momentum 0.99", 100 * self.keras_momentum, "the last batch alone", "error"),
            Bar("momentum 0.01", 100 * self.torch_momentum, "the same weights"),
            Bar("without BatchNorm", 100 * self.without_norms, "for comparison"),
        )
        return (
            QUOTE,
            Heading("Momentum", 3),
            Line(
                "In torch momentum is the weight of the new batch, in Keras that of the old value. "
                "The network of the post, trained twice on digits in batches of 8. Running "
                "statistics take no part in training, so the weights are bit-equal "
                f"({'yes' if self.same_weights else 'no'}); only what eval mode uses differs."
            ),
            Bars("accuracy in eval mode on 360 test digits", accuracies, "%"),
            Heading("print(sn.check(net))", 3),
            *as_checked(self.report),
            Heading("What enters each layer, with and without BatchNorm", 3),
            Line(
                "The histograms of the post's training loop, before the first step. With norms the "
                "spread stays. Without them every unit of the last layer ends at a value of its "
                f"own, whatever the digit: over the test digits it deviates by "
                f"{number(self.spread_without)} from it, with norms by {number(self.spread_with)}."
            ),
            *self.inputs,
            Heading("Statistics move in forward", 3),
            Line(
                "Not in backward and not in the optimizer's step: one forward in train mode under "
                "`torch.no_grad()` moved running_mean by "
                f"{number(self.moved_without_gradient)}. `sn.no_updates(net)` stops that."
            ),
            Heading("eval() in the middle of training", 3),
            Code(LOOP),
            Line(
                "With norms set to eval before the loop, its `net.train()` thaws "
                f"{self.thawed_by_loop} of them. `with sn.eval_mode(net):` in its place gives "
                f"every module back the mode it had: {self.thawed_by_eval_mode} thawed."
            ),
            Heading("A train() of one's own", 3),
            Code(inspect.getsource(MyNet)),
            Line(f"It works, and `sn.inspect` says what holds the layers: `{self.held_by}`."),
            Heading("Half precision", 3),
            Line(
                "Half weights beside float32 statistics, the mix of the post, still raise: "
                f"`{self.half_error}`. Convert the whole layer, or leave the whole layer in "
                "float32, as autocast does:"
            ),
            Table(
                ("under autocast to float16", "returns", "autograd keeps"),
                tuple((layer.name, layer.dtype, size(layer.saved_bytes)) for layer in self.frozen),
                "llr",
            ),
            Line(
                "Counted are the activations kept by convolution, norm and ReLU, for an input of "
                "8 x 16 x 56 x 56."
            ),
        )

    def numbers(self) -> Mapping[str, float]:
        """Return the measured numbers by name."""
        saved = {f"saved_bytes {layer.name}": float(layer.saved_bytes) for layer in self.frozen}
        return {
            "keras_momentum": self.keras_momentum,
            "torch_momentum": self.torch_momentum,
            "without_norms": self.without_norms,
            "moved_without_gradient": self.moved_without_gradient,
            "spread_with": self.spread_with,
            "spread_without": self.spread_without,
            "thawed_by_loop": self.thawed_by_loop,
            "thawed_by_eval_mode": self.thawed_by_eval_mode,
        } | saved


QUOTE = Quote(
    "Momentum smoothing of the BN layer in Pytorch is computed in the opposite way to the common "
    "momentum method ... expected scalar type Half but found Float",
    "thread 001",
)


def play(seed: int = 0, *, epochs: int = 4, track: Track = silent) -> Conventions:
    """Train the network of the post by both conventions, and try what else the post says.

    Raises:
        StillnormError: The conventions are within five points of each other.
    """
    train_set, test_set = digits(seed)

    def trained(momentum: float | None) -> nn.Module:
        torch.manual_seed(seed)
        net = PlottedNet(momentum)
        what = "without norms" if momentum is None else f"momentum {momentum}"
        _train(net, train_set, epochs, seed, track, what)
        return net.eval()

    keras, right, without = trained(KERAS), trained(TORCH), trained(None)
    wrong, as_meant = (measured_accuracy(net, test_set, 64) for net in (keras, right))
    demand_drama(Conventions.thread, "eval with momentum 0.01 and 0.99", as_meant, wrong)
    before = _before_training(test_set, seed)
    return Conventions(
        keras_momentum=wrong,
        torch_momentum=as_meant,
        same_weights=all(map(torch.equal, keras.parameters(), right.parameters())),
        without_norms=measured_accuracy(without, test_set, 64),
        moved_without_gradient=_moved_without_gradient(test_set.x[:BATCH], seed),
        thawed_by_loop=_thawed(right, test_set, by_hand=True),
        thawed_by_eval_mode=_thawed(right, test_set, by_hand=False),
        held_by=str(sn.inspect(MyNet(TORCH)).layers[0].held),
        half_error=half_error(),
        frozen=under_autocast(seed),
        report=sn.check(keras.train()),
        inputs=tuple(_histogram(title, values) for title, values in before.items()),
        spread_with=_spread(before["with BatchNorm"]),
        spread_without=_spread(before["without BatchNorm"]),
    )


def _train(net: nn.Module, data: Labelled, epochs: int, seed: int, track: Track, what: str) -> None:
    steps = data.shuffled(BATCH, epochs * -(-len(data) // BATCH), seed)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = OneCycleLR(optimizer, 1e-2, total_steps=len(steps))
    train(net.train(), data, track(steps, what), optimizer, schedule)


def _moved_without_gradient(x: Tensor, seed: int) -> float:
    """Return how far one forward moves running_mean of a new layer, at most."""
    torch.manual_seed(seed)
    net = PlottedNet(momentum=0.1)
    with torch.no_grad():
        net(x)
    return float(torch.as_tensor(net.get_submodule("bn0").running_mean).abs().max())


def _thawed(net: nn.Module, data: Labelled, *, by_hand: bool) -> int:
    """Count the norms set to eval that train again after the plotting in the post's loop."""
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm1d)]
    with sn.preserved(net):
        net.train()
        for norm in norms:
            norm.eval()
        if by_hand:
            net.eval()
            layer_inputs(net, data)
            net.train()
        else:
            with sn.eval_mode(net):
                layer_inputs(net, data)
        return sum(norm.training for norm in norms)


def _before_training(data: Labelled, seed: int) -> dict[str, list[Tensor]]:
    """Return what enters the layers of the untrained network, by batch statistics."""
    found = {}
    for momentum, title in ((TORCH, "with BatchNorm"), (None, "without BatchNorm")):
        torch.manual_seed(seed)
        found[title] = layer_inputs(PlottedNet(momentum), data)
    return found


def _histogram(title: str, inputs: list[Tensor]) -> Histogram:
    return histogram(title, {f"layer {i}": inputs[i] for i in (1, 4, 8)})


def _spread(inputs: list[Tensor]) -> float:
    """Return how far a unit of the last layer deviates over the samples, averaged over units."""
    return float(inputs[-1].std(0).mean())
