"""The grid: real architectures, a fault in each, and what `check` has to say about it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diagnosis.faults.parts import Called
from stillnorm import check, recalibrate
from stillnorm.diagnosis import Report
from stillnorm.norms import NormLayer, find_norms
from support.architectures import ARCHITECTURES, Architecture, Forward
from support.zoo import images, torchvision

BasicBlock, BasicStem, Conv3DSimple, VideoResNet = (
    getattr(torchvision.models.video.resnet, name)
    for name in ("BasicBlock", "BasicStem", "Conv3DSimple", "VideoResNet")
)

MODELS: dict[str, Architecture] = {
    "torchvision/resnet": Architecture(
        lambda: torchvision.models.ResNet(
            torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10
        ),
        ARCHITECTURES["torchvision/resnet18"].inputs,
    ),
    "timm/lcnet_050": ARCHITECTURES["timm/lcnet_050"],  # depthwise, norms that hold activations
    "transformers/resnet": ARCHITECTURES["transformers/resnet"],  # called with a keyword
    "here/signal": ARCHITECTURES["here/signal"],  # 1-D
    "torchvision/densenet": Architecture(  # norms before convolutions, on concatenations
        lambda: torchvision.models.DenseNet(16, (2, 3, 2), 32, num_classes=10),
        lambda n, seed: images(n, seed=seed, size=32),
    ),
    "torchvision/r3d": Architecture(  # 3-D
        lambda: VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, 10),
        lambda n, seed: images(2 * n, seed, size=16).reshape(n, 2, 3, 16, 16).transpose(1, 2),
    ),
    # In place of those above where a fault needs an image, or a layer that holds modules.
    "torchvision/mobilenet_v3_small": ARCHITECTURES["torchvision/mobilenet_v3_small"],
    "timm/tinynet_e": ARCHITECTURES["timm/tinynet_e"],
    "timm/resnet10t": ARCHITECTURES["timm/resnet10t"],
}
ALL = tuple(MODELS)[:6]
IMAGES = tuple(name for name in MODELS if name not in ("here/signal", "torchvision/r3d"))[:5]
FEW = ("transformers/resnet", "here/signal", "torchvision/densenet")  # for a rule's other faults

# The architecture on which fixes are applied.
REPAIRED = "transformers/resnet"


@dataclass(eq=False)
class Subject:
    """A healthy model of one's own to put a fault into.

    Args:
        name: The name of its architecture.
        model: The model.
        forward: How to call it, where ``model(batch)`` is not the way.
    """

    name: str
    model: nn.Module
    forward: Forward | None

    @property
    def architecture(self) -> Architecture:
        return MODELS[self.name]

    @property
    def layers(self) -> tuple[NormLayer, ...]:
        return find_norms(self.model)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(layer.path for layer in self.layers)

    @property
    def in_order(self) -> tuple[str, ...]:
        """The layers' paths as the forward calls them."""
        called: dict[str, None] = {}
        hooks = [
            layer.module.register_forward_pre_hook(
                lambda *_, path=layer.path: called.update({path: None})
            )
            for layer in self.layers
        ]
        with torch.no_grad():
            self.call(self.model, self.batches()[0])
        for hook in hooks:
            hook.remove()
        return tuple(called)

    @property
    def victim(self) -> NormLayer:
        """A layer in the middle."""
        return self.layers[len(self.layers) // 3]

    @property
    def call(self) -> Forward:
        """How to call the model."""
        return nn.Module.__call__ if self.forward is None else self.forward

    def recalibrate(self, batches: list[Tensor] | None = None) -> None:
        """Estimate the statistics of the model as it is now."""
        recalibrate(self.model, batches or self.batches(64, seed=2), forward=self.forward)

    def as_function(self) -> None:
        """Let the model take a tensor and return one."""
        if self.forward is not None:
            self.model, self.forward = Called(self.model, self.forward), None

    def batches(self, n: int = 32, size: int = 16, seed: int = 1) -> list[Tensor]:
        """Data like those that the statistics are of, and others."""
        return list(self.architecture.inputs(n, seed).split(size))

    def case(self, *paths: str, **given: Any) -> Case:
        """Return the model as it is now, to be checked with data, with the layers of its fault."""
        batches = given.pop("batches", None) or self.batches()
        return Case(self.model, paths, batches, {"forward": self.forward, **given})

    def put(self, path: str, module: nn.Module) -> None:
        """Put a module in the place of another."""
        parent, _, name = path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)


@dataclass(frozen=True, eq=False)
class Case:
    """A faulty model, and what its finding has to name.

    Args:
        model: The model; or a file.
        paths: The layers that have the fault.
        batches: What `check` gets.
        given: What else.
    """

    model: nn.Module | Path
    paths: tuple[str, ...]
    batches: object = None
    given: Mapping[str, Any] = field(default_factory=dict)

    def checked(self) -> Report:
        return check(self.model, self.batches, **self.given)  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Fault:
    """A kind of fault.

    Args:
        code: The rule that has to find it.
        inject: Puts it into a healthy model; or into a file, in the folder that it is given.
        severity: What the finding has to be.
        on: The architectures.
        among: Whether other layers, which feel the same, are named too.
        some: Whether layers are left out to which the fault makes no difference.
        beside: Other warnings that are true of the faulty model too, by code, and why.
        fix: Whether `Report.fix` makes it go away.
    """

    code: str
    inject: Callable[..., Case]
    severity: str
    on: tuple[str, ...] = ALL
    among: bool = False
    some: bool = False
    beside: Mapping[str, str] = field(default_factory=dict)
    fix: bool = False

    def __str__(self) -> str:
        return f"{self.code}-{self.inject.__name__}"


@cache
def _healthy(name: str) -> nn.Module:
    return MODELS[name].healthy()


def subject(name: str) -> Subject:
    """Return a healthy model that may be changed."""
    return Subject(name, copy.deepcopy(_healthy(name)), MODELS[name].forward)


def grid(faults: tuple[Fault, ...]) -> pytest.MarkDecorator:
    """Make a test of every fault on each of its architectures."""
    cases = [
        pytest.param(fault, name, id=f"{fault}-{name}") for fault in faults for name in fault.on
    ]
    return pytest.mark.parametrize(("fault", "name"), cases)


def repairs(faults: tuple[Fault, ...]) -> pytest.MarkDecorator:
    """Make a test of every fault that has a fix, on one architecture."""
    return pytest.mark.parametrize("fault", [fault for fault in faults if fault.fix], ids=str)


def assert_found(fault: Fault, name: str, *where: Path) -> None:
    """Inject the fault: its own code names its own layer, and nothing else is wrong."""
    torch.manual_seed(0)
    case = fault.inject(subject(name), *where)
    report = case.checked()
    assert report.crashed == ()
    own = [finding for finding in report.findings if finding.code == fault.code]
    assert own, f"{fault.code} is not among {_seen(report)}"
    (finding,) = own
    if fault.among:
        assert set(case.paths) <= set(finding.paths)
    elif fault.some:
        assert finding.paths
        assert set(finding.paths) <= set(case.paths)
    else:
        assert finding.paths == case.paths
    assert finding.severity == fault.severity
    others = {
        f.code: (f.severity, f.message)
        for f in report.findings
        if f.code != fault.code and (f.severity == "error" or f.code not in fault.beside)
        if f.severity != "info"
    }
    assert others == {}


def assert_repaired(fault: Fault, name: str = REPAIRED) -> None:
    """Inject the fault and apply its fix: it is found no more."""
    torch.manual_seed(0)
    case = fault.inject(subject(name if name in fault.on else fault.on[0]))
    report = case.checked()
    assert any(f.code == fault.code and f.fix is not None for f in report.findings)
    applied = report.fix(unsafe=True)
    assert fault.code in {code for code, _ in applied.fixes}
    after = case.checked()
    assert after.crashed == ()
    left = {f.code: f.message for f in after.findings if f.severity != "info"}
    assert fault.code not in {f.code for f in after.findings}, left
    assert set(left) <= set(fault.beside), left


def _seen(report: Report) -> dict[str, tuple[str, ...]]:
    return {finding.code: finding.paths for finding in report.findings}
