"""SN115: fires where arithmetic and data agree that the initial statistics are left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import stillnorm as sn
from diagnosis.nets import batches, conv_net, data, estimated, found
from stillnorm import check, freeze
from support.zoo import images, make


def trained(steps: int, momentum: float = 0.1, inputs: float = 1.0, **norm: object) -> nn.Module:
    torch.manual_seed(0)
    net = conv_net(momentum=momentum, **norm).train()
    for step in range(steps):
        net(inputs * data(16, seed=50 + step))
    return net


@pytest.mark.parametrize(("steps", "momentum"), [(1, 0.1), (9, 0.1), (300, 0.001), (20, 0.1)])
def test_data_confirm_it(steps: int, momentum: float) -> None:
    report = check(trained(steps, momentum), batches())
    assert set(found(report)) == {"SN115"}
    finding = next(f for f in report.findings if f.code == "SN115")
    assert "4" in finding.paths  # the input of "1" has nearly variance 1 anyway
    assert finding.evidence["left"]["4"] == pytest.approx((1 - momentum) ** steps)
    assert finding.severity == "error"
    assert f"SN105 on {', '.join(finding.paths)} (not repeated)" in finding.explains


def test_it_says_it_in_numbers() -> None:
    (finding,) = check(trained(300, 0.001), batches(), select="SN115").findings
    assert finding.message == "momentum 0.001 after 300 updates leaves 74 % of the initial values"


def test_without_data_the_whole_network_has_to_look_like_it() -> None:
    report = check(trained(9))
    assert found(report) == {"SN115": ("1", "4")}
    assert report.findings[0].severity == "warning"
    assert report.findings[0].fix is None


def test_without_sn115_the_mismatch_names_the_cause() -> None:
    (finding,) = check(trained(300, 0.001), batches(), select="SN105").findings
    assert finding.note == "momentum 0.001 after 300 updates leaves 74 % of the initial values"


def test_another_mismatch_stays_what_it_is() -> None:
    """The input is of another scale, and taking the initial share out makes nothing better."""
    net = trained(9, inputs=3.0)
    sn.recalibrate(net, [3 * data(64, seed=9)])
    net[1].num_batches_tracked.fill_(9)
    report = check(net, [9 + x for x in batches()])
    assert found(report) == {"SN105": ("1",)}
    assert report.findings[0].note == ""


def test_below_five_percent_a_mismatch_is_a_mismatch() -> None:
    """Means of twenty deviations, of which 5.2 and 4.7 % are missing."""
    torch.manual_seed(0)
    for steps, code in ((28, "SN115"), (29, "SN105")):
        net = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2))
        for _ in range(steps):
            net(20 + torch.randn(256, 8))
        assert found(check(net, 20 + torch.randn(64, 8))) == {code: ("0",)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_in_other_dtypes(dtype: torch.dtype) -> None:
    assert found(check(trained(9).to(dtype), select="SN115")) == {"SN115": ("1", "4")}


class TestNearMisses:
    def silent(self, net: nn.Module, given: object = None) -> None:
        report = check(net, given, select="SN115")
        assert (report.findings, report.crashed) == ((), ())

    def test_below_five_percent(self) -> None:
        for given in (None, batches()):
            self.silent(trained(29), given)

    def test_a_legacy_checkpoint_with_a_count_of_zero(self) -> None:
        net = trained(9)
        for path in ("1", "4"):
            net.get_submodule(path).num_batches_tracked.zero_()
        for given in (None, batches()):
            self.silent(net, given)

    @pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
    def test_after_recalibrate(self, scale: float) -> None:
        """It counts its batches as further updates, and the momentum is still 0.1."""
        net = trained(9)
        given = [scale * x for x in batches()]
        sn.recalibrate(net, given)
        assert int(net[1].num_batches_tracked) == 9 + len(given)
        for seen in (None, given):
            self.silent(net, seen)

    def test_true_statistics_that_happen_to_be_above_the_share(self) -> None:
        """Nothing in the buffers refutes it; the data do."""
        net = nn.Sequential(nn.BatchNorm1d(32))
        x = torch.randn(64, 32) * torch.linspace(1, 2, 32)
        sn.recalibrate(net, [x])
        assert (net[0].running_var > 0.6).all()
        self.silent(net, [x])

    def test_whitened_inputs_whose_variance_is_one_either_way(self) -> None:
        net = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 2))
        for seed in range(2):
            torch.manual_seed(seed)
            net(torch.randn(256, 32))
        self.silent(net)

    def test_one_layer_of_the_same_count_refutes_it_for_all(self) -> None:
        net = trained(9)
        net[1].running_var[0] = 0.3  # below 0.9 ** 9
        self.silent(net)

    def test_momentum_none_and_zero(self) -> None:
        self.silent(trained(9, momentum=None))  # type: ignore[arg-type]
        self.silent(trained(9, momentum=0.0))

    def test_a_held_layer(self) -> None:
        net = trained(9)
        freeze(net)
        for given in (None, batches()):
            self.silent(net, given)

    def test_fine_tuned_from_a_legacy_checkpoint(self) -> None:
        net = estimated(conv_net())
        for path in ("1", "4"):
            net.get_submodule(path).num_batches_tracked.zero_()
        for step in range(9):
            net(data(16, seed=step))
        for given in (None, batches()):
            self.silent(net, given)

    def test_no_values(self) -> None:
        self.silent(
            nn.Sequential(
                nn.LazyBatchNorm1d(),
                nn.BatchNorm1d(4, device="meta"),
                nn.BatchNorm1d(4, track_running_stats=False),
                nn.InstanceNorm1d(4, track_running_stats=True),
                nn.BatchNorm1d(0),
                nn.BatchNorm1d(4, momentum=1.0),
            )
        )

    def test_statistics_reset_beside_an_old_count_are_another_finding(self) -> None:
        net = conv_net()
        net[1].num_batches_tracked.fill_(5)
        assert found(check(net, batches())) == {"SN101": ("1", "4")}


def test_the_fix_estimates_them() -> None:
    net = trained(9)
    check(net, batches()).fix(unsafe=True)
    assert found(check(net, batches())) == {}
    assert found(check(net)) == {}


def test_a_real_network_after_nine_steps() -> None:
    model = make("torchvision/resnet18", calibrated=False).train()
    for step in range(9):
        model(images(8, seed=step, size=32))
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for report in (check(model), check(model, images(64, seed=99, size=32).split(16))):
        assert set(found(report)) == {"SN115"}
        assert len(found(report)["SN115"]) >= len(layers) / 2
