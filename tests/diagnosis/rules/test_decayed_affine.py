"""SN305: a preview that names the norms that an optimizer decays."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from diagnosis.nets import conv_net
from stillnorm import check, freeze
from stillnorm.diagnosis import Report
from stillnorm.diagnosis.finding import Finding
from support.zoo import make


def checked(net: nn.Module, optimizer: Optimizer) -> Report:
    report = check(net, optimizer=optimizer, select="decayed-affine")
    assert report.crashed == ()
    return report


def the_finding(net: nn.Module, optimizer: Optimizer) -> Finding:
    (finding,) = checked(net, optimizer).findings
    assert (finding.code, finding.severity) == ("SN305", "info")
    return finding


def test_every_norm_of_an_optimizer_that_decays() -> None:
    net = conv_net()
    finding = the_finding(net, AdamW(net.parameters(), weight_decay=0.05))
    assert finding.paths == ("1", "4")
    assert finding.evidence["weight_decay"] == {"1": 0.05, "4": 0.05}
    assert finding.message == "weight decay of 0.05 on the parameters of 2 norm layers"


def test_the_groups_are_told_apart() -> None:
    net = conv_net()
    groups = [
        {"params": [net[1].weight], "weight_decay": 0.0},
        {"params": [net[1].bias], "weight_decay": 0.1},
        {"params": net[4].parameters(), "weight_decay": 0.2},
    ]
    finding = the_finding(net, SGD(groups, lr=0.1))
    assert finding.evidence["weight_decay"] == {"1": 0.1, "4": 0.2}
    assert finding.message.startswith("weight decay of 0.1 and 0.2 on")


def test_a_real_model() -> None:
    net = make("torchvision/resnet18", calibrated=False)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    finding = the_finding(net, SGD(net.parameters(), lr=0.1, weight_decay=1e-4))
    assert len(finding.paths) == len(norms) == 20


class TestNearMisses:
    def test_it_runs_only_by_its_own_name(self) -> None:
        net = conv_net()
        optimizer = AdamW(net.parameters())
        for select, is_run in ((None, False), ("SN3", False), ("ALL", True)):
            report = check(net, optimizer=optimizer, select=select)
            assert ("SN305" in {finding.code for finding in report.findings}) is is_run

    @pytest.mark.parametrize("change", [freeze, lambda net: net.requires_grad_(False)])
    @pytest.mark.filterwarnings("ignore:frozen with statistics")
    def test_what_does_not_train_is_not_decayed(self, change: object) -> None:
        net = conv_net()
        optimizer = AdamW(net.parameters())
        change(net)
        assert checked(net, optimizer).findings == ()

    def test_no_decay_and_no_affine(self) -> None:
        net = conv_net()
        assert checked(net, SGD(net.parameters(), lr=0.1)).findings == ()
        bare = conv_net(affine=False)
        assert checked(bare, AdamW(bare.parameters())).findings == ()

    def test_norms_in_a_group_of_their_own(self) -> None:
        net = conv_net()
        decayed = [p for p in net.parameters() if p.dim() > 1]
        others = [p for p in net.parameters() if p.dim() < 2]
        groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        assert checked(net, AdamW(groups, weight_decay=0.1)).findings == ()

    def test_an_optimizer_without_such_a_thing(self) -> None:
        net = conv_net()
        assert checked(net, torch.optim.LBFGS(net.parameters())).findings == ()
        assert checked(net, torch.optim.Rprop(net.parameters())).findings == ()
