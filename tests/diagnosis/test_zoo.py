"""Real architectures: silent when healthy, each fault found by its own rule at its own layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import found
from stillnorm import check, freeze, recalibrate
from stillnorm.diagnosis import Report
from stillnorm.norms import NormLayer, find_norms
from support.zoo import CLASSIFIERS, images, make

# A find, not a false alarm: transformers' MobileNetV2 has TensorFlow's momentum of 0.997.
HAS_KERAS_MOMENTUM = "transformers/mobilenet_v2"

# With batches every fault is tried on these, and on the others those that need a forward.
ALL_WITH_DATA = {"torchvision/resnet18", "timm/lcnet_050", "transformers/resnet"}


@cache
def healthy(name: str) -> nn.Module:
    model = make(name)
    if name == HAS_KERAS_MOMENTUM:
        for norm in find_norms(model):
            norm.module.momentum = 0.003
    return model


@cache
def fresh(size: int, n: int = 32) -> list[Tensor]:
    return list(images(n, seed=999).split(size))


def victim(model: nn.Module) -> NormLayer:
    layers = find_norms(model)
    return layers[len(layers) // 3]


# ------------------------------------------------------------------------------------ faults


def frozen_parameters(model: nn.Module) -> str:
    """Freeze everything up to the victim by requires_grad."""
    layer = victim(model)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.requires_grad_(False)
        if module is layer.module:
            return layer.path
    raise AssertionError


def momentum_zero(model: nn.Module) -> str:
    victim(model).module.momentum = 0
    return victim(model).path


def single_eval(model: nn.Module) -> str:
    model.train()
    victim(model).module.eval()
    return victim(model).path


def frozen_identity(model: nn.Module) -> str:
    victim(model).module.reset_running_stats()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        freeze(model, victim(model).path)
    return victim(model).path


def lost_statistics(model: nn.Module) -> str:
    victim(model).module.reset_running_stats()
    return victim(model).path


def not_a_number(model: nn.Module) -> str:
    victim(model).module.running_var[1] = torch.nan
    return victim(model).path


def moved_statistics(model: nn.Module) -> str:
    module = victim(model).module
    module.running_mean += module.running_var.sqrt()
    return victim(model).path


def untracked(model: nn.Module) -> str:
    module = victim(model).module
    module.track_running_stats = False
    module.running_mean = module.running_var = module.num_batches_tracked = None
    return victim(model).path


def keras(model: nn.Module) -> str:
    victim(model).module.momentum = 0.99
    return victim(model).path


def unused(model: nn.Module) -> str:
    model.spare = nn.BatchNorm2d(5)
    return "spare"


def shared(model: nn.Module) -> str:
    """Use the first norm in place of a later one of the same size; estimate what then results."""
    layers = find_norms(model)
    first, other = next((a, b) for a, b in combinations(layers, 2) if _alike(a, b))
    parent, _, name = other.path.rpartition(".")
    setattr(model.get_submodule(parent), name, first.module)
    recalibrate(model, fresh(16))
    return first.path


def _alike(a: NormLayer, b: NormLayer) -> bool:
    return type(a.module) is type(b.module) and a.num_features == b.num_features


class Ending(nn.Sequential):
    """The model and something after it."""


def norm_at_the_end(model: nn.Module) -> nn.Module:
    ending = Ending(model, nn.BatchNorm1d(classes(model)))
    recalibrate(ending, fresh(16, 16))
    return ending


def norm_before_the_end(model: nn.Module) -> nn.Module:
    n = classes(model)
    ending = Ending(model, nn.BatchNorm1d(n), nn.Linear(n, 4))
    recalibrate(ending, fresh(16, 16))
    return ending


def classes(model: nn.Module) -> int:
    with torch.no_grad():
        return model.eval()(fresh(16)[0][:1]).shape[1]


@dataclass(frozen=True)
class Fault:
    code: str
    inject: Callable[[nn.Module], str]
    wrap: Callable[[nn.Module], nn.Module] | None = None
    forward: bool = False
    size: int = 16
    n: int = 32


FAULTS = (
    Fault("SN001", frozen_parameters),
    Fault("SN002", momentum_zero),
    Fault("SN003", single_eval),
    Fault("SN004", frozen_identity),
    Fault("SN101", lost_statistics),
    Fault("SN102", not_a_number),
    Fault("SN105", moved_statistics, forward=True),
    Fault("SN107", untracked),
    Fault("SN108", keras),
    Fault("SN114", unused, forward=True, n=16),
    Fault("SN201", shared, forward=True),
    Fault("SN203", lambda _: "1", norm_at_the_end, forward=True, n=16),
    Fault("SN206", lambda _: "1", norm_before_the_end, forward=True, size=2, n=8),
    Fault("SN207", lambda _: "1", norm_before_the_end, forward=True, size=4, n=16),
)


def with_fault(name: str, fault: Fault) -> tuple[nn.Module, str]:
    model = copy.deepcopy(healthy(name))
    if fault.wrap is not None:
        model = fault.wrap(model)
    return model, fault.inject(model)


def assert_found_alone(report: Report, fault: Fault, path: str) -> None:
    """The fault's code names the fault's layer, and nothing else is an error."""
    assert report.crashed == ()
    by_code = {finding.code: finding for finding in report.findings}
    assert fault.code in by_code, f"{fault.code} is not among {sorted(by_code)}"
    paths = by_code[fault.code].paths
    assert path in paths
    if fault.code not in ("SN001", "SN207"):  # a frozen part, and small batches, are many layers
        assert paths == (path,)
    others = [f for f in report.findings if f.code != fault.code and f.severity == "error"]
    assert others == []


# ------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_healthy_models_have_no_error_and_no_warning(name: str) -> None:
    model = healthy(name)
    assert found(check(model)) == {}
    report = check(model, fresh(32, 64))
    assert found(report) == {}
    assert report.verdict.choice == "train"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.code)
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_each_fault_is_found_at_its_own_layer(name: str, fault: Fault) -> None:
    model, path = with_fault(name, fault)
    if not fault.forward:
        assert_found_alone(check(model), fault, path)
    if fault.forward or name in ALL_WITH_DATA:
        assert_found_alone(check(model, fresh(fault.size, fault.n)), fault, path)


def test_keras_momentum_is_found_in_a_published_model() -> None:
    assert found(check(make(HAS_KERAS_MOMENTUM))).keys() == {"SN108"}
