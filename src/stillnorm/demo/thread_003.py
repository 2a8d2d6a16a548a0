"""Chapter 1, thread 003: one norm used at several places."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import stillnorm as sn
from stillnorm.demo.chapter import Chapter, Track, as_checked, checked, demand_drama
from stillnorm.demo.data import as_photographs, digits
from stillnorm.demo.posted import post
from stillnorm.demo.progress import silent
from stillnorm.demo.samples import histogram
from stillnorm.demo.training import accuracy, measured_accuracy, train
from stillnorm.diagnosis import Report
from stillnorm.reports import Bar, Bars, Block, Code, Heading, Histogram, Line, Quote, Span, Table
from stillnorm.reports.numbers import percent

RANK = 8  # rank1 and rank2 of the post, which does not say
BATCH = 64


@dataclass(frozen=True, eq=False)
class SharedNorm(Chapter):
    """What was measured.

    Args:
        train_mode: Accuracy on the test digits by batch statistics.
        eval: The same in eval mode.
        recalibrated: In eval mode after `recalibrate`, the norms still shared.
        one_norm_per_call: In eval mode with a norm for each call, and the same weights.
        weights_untouched: Whether all parameters are bit-equal after the repair.
        report: What `check` said.
        split: What `split_shared` said.
        inputs: What the calls of bn_6 receive.
    """

    train_mode: float
    eval: float
    recalibrated: float
    one_norm_per_call: float
    weights_untouched: bool
    report: Report
    split: str
    inputs: Histogram

    thread = "003"
    title = "Right in training, wrong in eval()"

    def brief(self) -> tuple[Block, ...]:
        """Tell it in a few lines."""
        rows = (
            (
                "his network, unchanged, on digits",
                f"train-mode {percent(self.train_mode)}",
                ("eval ", Span(percent(self.eval), "error")),
                "",
            ),
            (
                "sn.recalibrate(net, train_set)",
                "",
                f"eval {percent(self.recalibrated)}",
                "one set cannot fit two inputs",
            ),
            (
                "sn.split_shared(net, train_set)",
                "",
                f"eval {percent(self.one_norm_per_call)}",
                f"weights untouched: {'yes' if self.weights_untouched else 'no'}",
            ),
        )
        return (QUOTE, Table((), rows, "llll", indent=2), checked(self.report.findings))

    def page(self) -> tuple[Block, ...]:
        """Tell it with code, plots and findings."""
        bars = (
            Bar("train-mode", 100 * self.train_mode, "by the statistics of each batch of 64"),
            Bar("eval", 100 * self.eval, "what he saw", "error"),
            Bar("recalibrated", 100 * self.recalibrated, "one set cannot fit two inputs"),
            Bar("split", 100 * self.one_norm_per_call, "one norm per call, the same weights"),
        )
        return (
            QUOTE,
            Line(
                "His class, copied from the thread, trained for a few epochs on scikit-learn's "
                "digits at 3 x 32 x 32. `bn_6` and `bn_7` are called twice, `bn_2` three times."
            ),
            Bars("accuracy on 360 test digits", bars, "%"),
            self.inputs,
            Line(
                "In train mode each call is normalised by its own batch, so training goes well. In "
                "eval mode all calls share one mixture of statistics that fits none of them."
            ),
            Heading("print(sn.check(net, train_set, score=accuracy))", 3),
            *as_checked(self.report),
            Heading("The repair", 3),
            Line(
                "One norm for each call, with the trained weights, and statistics estimated on the "
                "training set. No training, and not a line of the network is written anew:"
            ),
            Code("print(sn.split_shared(net, train_set))"),
            Code(self.split, "text"),
            Heading("The network, as posted", 3),
            Code(post(self.thread).source),
        )

    def numbers(self) -> Mapping[str, float]:
        """Return the measured numbers by name."""
        return {
            "train_mode": self.train_mode,
            "eval": self.eval,
            "recalibrated": self.recalibrated,
            "one_norm_per_call": self.one_norm_per_call,
        }


QUOTE = Quote(
    "training accuracy is perfect ... model.train(True) will get 76% accuracy ... model.eval() "
    "will get only 10%",
    "thread 003",
)


def play(seed: int = 0, *, epochs: int = 4, track: Track = silent) -> SharedNorm:
    """Train the posted network, look at it, repair it.

    Raises:
        StillnormError: Eval is within five points of train mode.
    """
    train_set, test_set = map(as_photographs, digits(seed))
    torch.manual_seed(seed)
    net = post(SharedNorm.thread).make("Keras_Cifar2", RANK, RANK)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    steps = train_set.shuffled(BATCH, epochs * -(-len(train_set) // BATCH), seed)
    train(net, train_set, track(steps, "training his network"), optimizer)

    with sn.preserved(net):
        train_mode = measured_accuracy(net.train(), test_set, BATCH)
    with sn.eval_mode(net):
        eval_ = measured_accuracy(net, test_set, BATCH)
    demand_drama(SharedNorm.thread, "train-mode and eval accuracy", train_mode, eval_)

    batches = train_set.batches(BATCH)
    report = sn.check(net, batches, score=accuracy)
    inputs = _inputs(net, test_set.x[:BATCH])
    weights = [parameter.detach().clone() for parameter in net.parameters()]
    repaired = copy.deepcopy(net)
    sn.recalibrate(net, track(batches, "recalibrating"))
    split = sn.split_shared(repaired, track(batches, "one norm per call"))
    return SharedNorm(
        train_mode=train_mode,
        eval=eval_,
        recalibrated=measured_accuracy(net.eval(), test_set, BATCH),
        one_norm_per_call=measured_accuracy(repaired.eval(), test_set, BATCH),
        weights_untouched=all(map(torch.equal, repaired.parameters(), weights)),
        report=report,
        split=str(split),
        inputs=inputs,
    )


def _inputs(net: nn.Module, x: Tensor) -> Histogram:
    """Record what each call of bn_6 receives as the network was trained, by batch statistics."""
    calls: list[Tensor] = []
    with sn.preserved(net), torch.no_grad():
        net.get_submodule("bn_6").register_forward_pre_hook(
            lambda module, inputs: calls.append(inputs[0].clone())
        )
        net.train()(x)
    return histogram(
        "what bn_6 receives",
        {f"call {i}": values for i, values in enumerate(calls, start=1)},
    )
