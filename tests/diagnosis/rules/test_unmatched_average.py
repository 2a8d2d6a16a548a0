"""SN602: averages of weights with statistics of other weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check, freeze, recalibrate
from stillnorm.diagnosis import Finding
from support.zoo import make, timm


def steps(net: nn.Module, far: float = 1.0, n: int = 4) -> list[nn.Module]:
    """The net after each of a few long ways, with its own statistics every time."""
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(n):
        with torch.no_grad():
            for module in net.modules():
                if isinstance(module, nn.Conv2d):
                    w = module.weight
                    w.add_(far * w.std() * torch.randn(w.shape, generator=g))
        recalibrate(net, [data(seed=7)])
        found.append(copy.deepcopy(net))
    return found


def averaged(far: float = 1.0, **options: object) -> AveragedModel:
    net = estimated(conv_net())
    average = AveragedModel(net, **options)
    for live in steps(net, far):
        average.update_parameters(live)
    return average


def parameters_only() -> tuple[nn.Module, nn.Module]:
    """The live net, and an average that a loop over `parameters()` has made of it."""
    live = estimated(conv_net())
    ema = copy.deepcopy(live)
    for net in steps(live):
        with torch.no_grad():
            for a, b in zip(ema.parameters(), net.parameters(), strict=True):
                a.lerp_(b, 0.5)
    return live, ema


def only(net: nn.Module, **options: object) -> Finding:
    report = check(net, batches(), select=("SN101", "SN105", "SN602"), **options)
    assert set(found(report)) == {"SN602"}, found(report)
    (finding,) = (f for f in report.findings if f.code == "SN602")
    return finding


@pytest.mark.parametrize("multi", [None, get_ema_multi_avg_fn(0.5)])
def test_torchs_averaged_model_has_the_last_ones_statistics(multi: object) -> None:
    finding = only(averaged(multi_avg_fn=multi))
    assert finding.paths == ("1", "4")
    assert finding.severity == "error"
    assert finding.evidence["averaged"] == 4
    assert "average 4 models, the statistics are the last one's" in finding.message
    assert "SN105 on 1, 4" in finding.explains


def test_averaged_statistics_are_not_those_of_averaged_weights() -> None:
    finding = only(averaged(far=2, use_buffers=True))
    assert "the statistics are averages, too" in finding.message


class TestOtherAverages:
    class ModelEma(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    class Student(nn.Module):
        """A live net and its average in one module."""

        def __init__(self, live: nn.Module, ema: nn.Module) -> None:
            super().__init__()
            self.net = live
            self.ema_model = ema

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + self.ema_model(x)

    def test_a_wrapper_of_such_a_name(self) -> None:
        _, ema = parameters_only()
        assert only(self.ModelEma(ema)).paths == ("1", "4")

    def test_timms(self) -> None:
        live, ema = parameters_only()
        wrapper = timm.utils.ModelEmaV2(live)
        wrapper.module = ema
        finding = only(wrapper, forward=lambda model, batch: model.module(batch))
        assert finding.paths == ("1", "4")

    def test_a_child_of_such_a_name_beside_its_live_net(self) -> None:
        live, ema = parameters_only()
        finding = only(self.Student(live, ema))
        assert finding.paths == ("ema_model.1", "ema_model.4")
        for a, b in ((ema[1], live[1]), (ema[4], live[4])):
            a.running_mean.copy_(b.running_mean)
            a.running_var.copy_(b.running_var)
        assert "those of the live weights" in only(self.Student(live, ema)).note

    def test_statistics_that_were_never_estimated(self) -> None:
        _, ema = parameters_only()
        for i in (1, 4):
            ema[i].reset_running_stats()
        finding = only(self.ModelEma(ema))
        assert "never estimated" in finding.note

    def test_nothing_is_said_of_an_average_that_the_forward_does_not_call(self) -> None:
        live, ema = parameters_only()
        report = check(
            self.Student(live, ema),
            batches(),
            forward=lambda model, batch: model.net(batch),
            select="SN602",
        )
        assert report.findings == ()


class TestNearMisses:
    def codes(self, net: nn.Module, given: object = None) -> set[str]:
        report = check(net, batches() if given is None else given, select=("SN105", "SN602"))
        return set(found(report))

    def test_an_average_that_is_near(self) -> None:
        assert self.codes(averaged(far=0.02)) == set()

    def test_an_average_with_its_own_statistics(self) -> None:
        average = averaged()
        update_bn(data(seed=7).split(32), average)
        assert self.codes(average) == set()

    def test_nothing_averaged_yet(self) -> None:
        net = estimated(conv_net())
        net[1].running_mean.add_(3)
        assert self.codes(AveragedModel(net)) == {"SN105"}

    def test_a_stale_network_that_is_no_average(self) -> None:
        _, ema = parameters_only()
        assert self.codes(ema) == {"SN105"}
        assert self.codes(nn.Sequential(ema)) == {"SN105"}

    def test_a_module_called_ema_without_a_live_one(self) -> None:
        """Efficient multi-scale attention has the same three letters."""

        class Net(nn.Module):
            def __init__(self, ema: nn.Module) -> None:
                super().__init__()
                self.ema = ema
                self.head = nn.Linear(4, 2)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.ema(x))

        assert self.codes(Net(parameters_only()[1])) == {"SN105"}

    def test_held(self) -> None:
        average = averaged()
        freeze(average)
        assert self.codes(average) == set()

    def test_few_samples_are_a_remark(self) -> None:
        findings = check(averaged(), batches(16), select="SN602").findings
        assert [f.severity for f in findings] == ["info"]

    def test_a_preview_runs_by_its_own_name_only(self) -> None:
        assert set(found(check(averaged(), batches()))) == {"SN105"}


def test_the_fix_estimates_the_statistics() -> None:
    average = averaged()
    report = check(average, batches(), select="SN602")
    assert report.findings[0].fix.applicability == "unsafe"
    report.fix(unsafe=True)
    assert found(check(average, batches(), select=("SN105", "SN602"))) == {}


def test_a_real_architecture() -> None:
    live = make("timm/lcnet_050")
    given = list(data(32).repeat(1, 1, 4, 4).split(16))
    average = AveragedModel(live)
    recalibrate(live, given)
    average.update_parameters(live)
    average.update_parameters(live)
    assert found(check(average, given, select="SN602")) == {}
    with torch.no_grad():
        for parameter in average.module.blocks[2].parameters():
            parameter.mul_(2)
    paths = found(check(average, given, select="SN602"))["SN602"]
    assert paths[0].startswith("blocks.2.")
