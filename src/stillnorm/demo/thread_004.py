"""Chapter 4, thread 004: an exporter that thaws the model."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import stillnorm as sn
from stillnorm.demo.chapter import Chapter, Track, as_checked, checked
from stillnorm.demo.posted import post
from stillnorm.demo.progress import silent
from stillnorm.diagnosis import Report
from stillnorm.diagnosis.inspection import Inspection
from stillnorm.errors import StillnormWarning
from stillnorm.reports import Block, Code, Heading, Line, Quote, Span, Table
from stillnorm.reports.numbers import number

HIS = """\
torch.manual_seed(0)
net = Net()
net.bn.bias.requires_grad=False
net.bn.weight.requires_grad=False
with torch.no_grad():
    net.bn.weight.fill_(1.)
net.bn.eval()

x = torch.randn(1, 3, 5, 5)
torch.onnx.export(net, x, 'ayeonnx.onnx')
net(x)
"""


@dataclass(frozen=True)
class Export:
    """One export, and what it left behind.

    Args:
        name: How it was exported.
        before: `bn.training` before.
        after: `bn.training` after.
        moved: How far the network's output moved, at most.
        statistics_moved: How far running_mean moved in the forward afterwards, at most.
    """

    name: str
    before: bool
    after: bool
    moved: float
    statistics_moved: float

    def row(self) -> tuple[str | Span, ...]:
        """Return the export as a row."""
        flipped = self.before != self.after
        return (
            self.name,
            Span(f"{self.before} -> {self.after}", "error" if flipped else ""),
            number(self.moved),
            number(self.statistics_moved),
        )


HEADER = ("", "bn.training", "output moved", "running_mean moved")


@dataclass(frozen=True, eq=False)
class Exporter(Chapter):
    """What was measured.

    Args:
        plain: ``torch.onnx.export(net, x, file, dynamo=False)``, the exporter of the thread.
        held: The same with the layer held.
        preserved: The same inside `sn.preserved`.
        default: The default exporter of torch today; None where onnxscript is not installed.
        report: What `check` says of the network before the export.
        used: What the forward after the plain export really used.
    """

    plain: Export
    held: Export
    preserved: Export
    default: Export | None
    report: Report
    used: Inspection

    thread = "004"
    title = "The exporter that thawed it"

    def brief(self) -> tuple[Block, ...]:
        """Tell it in a few lines."""
        return (QUOTE, self._table(2), checked(self.report.findings))

    def page(self) -> tuple[Block, ...]:
        """Tell it with code and findings."""
        return (
            QUOTE,
            Line(
                "He sets one layer to eval inside a model in train mode, exports it, and calls it. "
                "The exporter remembers one mode for the whole model and sets all of it back to "
                "that:"
            ),
            Code(HIS),
            self._table(0),
            Line(
                "`dynamo=False` asks for the exporter of the thread. The default exporter of "
                "torch 2.13 leaves the modes alone."
            ),
            Heading("print(sn.inspect(net, x)), after the export", 3),
            Line(self.used.document().title),
            *self.used.document().blocks,
            Heading("print(sn.check(net)), before it", 3),
            *as_checked(self.report),
            Heading("The network, as posted", 3),
            Code(post(self.thread).source),
        )

    def _table(self, indent: int) -> Table:
        exports = (self.plain, self.held, self.preserved, self.default)
        rows = [export.row() for export in exports if export is not None]
        if self.default is None:
            rows.append((DEFAULT, "needs onnxscript", "", ""))
        return Table(HEADER, tuple(rows), "llrr", indent=indent)

    def numbers(self) -> Mapping[str, float]:
        """Return the measured numbers by name."""
        default = {} if self.default is None else {"moved_default": self.default.moved}
        return {
            "moved": self.plain.moved,
            "moved_held": self.held.moved,
            "moved_preserved": self.preserved.moved,
        } | default


QUOTE = Quote(
    "this messes up the whole thing! ... for some reason the net object got affected",
    "thread 004",
)
DEFAULT = "torch.onnx.export(net, x, file)"


def play(seed: int = 0, *, track: Track = silent) -> Exporter:
    """Export the posted network in four ways and look at what is left."""
    torch.manual_seed(seed)
    net = _his_network()
    x = torch.randn(1, 3, 5, 5)
    held = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StillnormWarning)  # his statistics are the initial ones
        sn.freeze(held)
    exports = {
        "plain": ("torch.onnx.export(..., dynamo=False)", net, _export),
        "held": ("the same, after sn.freeze(net)", held, _export),
        "preserved": ("the same, in sn.preserved(net)", net, _export_preserving),
        "default": (DEFAULT, net, _export_by_default),
    }
    names = list(exports) if importlib.util.find_spec("onnxscript") else list(exports)[:-1]
    with _silence():
        report = sn.check(net)
        done = {name: _left_behind(*exports[name], x) for name in track(names, "exporting")}
        thawed = copy.deepcopy(net)
        _export(thawed, x)
        used = sn.inspect(thawed, x)
    return Exporter(
        done["plain"], done["held"], done["preserved"], done.get("default"), report, used
    )


def _his_network() -> nn.Module:
    net = post(Exporter.thread).make("Net")
    bn = net.get_submodule("bn")
    bn.requires_grad_(False)
    nn.init.ones_(torch.as_tensor(bn.weight))
    bn.eval()
    return net


def _left_behind(
    name: str, net: nn.Module, export: Callable[[nn.Module, Tensor], None], x: Tensor
) -> Export:
    """Export a copy of the network and compare it with what it was."""
    net = copy.deepcopy(net)
    bn = net.get_submodule("bn")
    before, output, mean = bn.training, net(x), torch.as_tensor(bn.running_mean).clone()
    export(net, x)
    after, moved = bn.training, net(x) - output
    return Export(
        name, before, after, _largest(moved), _largest(torch.as_tensor(bn.running_mean) - mean)
    )


def _export(net: nn.Module, x: Tensor) -> None:
    """Export as torch did at the time."""
    _to_file(net, x, dynamo=False)


def _export_preserving(net: nn.Module, x: Tensor) -> None:
    with sn.preserved(net):
        _export(net, x)


def _export_by_default(net: nn.Module, x: Tensor) -> None:
    _to_file(net, x, dynamo=True)


def _to_file(net: nn.Module, x: Tensor, *, dynamo: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is old, and that the model trains
        torch.onnx.export(net, (x,), str(Path(folder) / "ayeonnx.onnx"), dynamo=dynamo)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep to itself what the posted network prints in every forward."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())
