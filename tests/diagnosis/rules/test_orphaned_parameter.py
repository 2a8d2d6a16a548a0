"""SN304: fires where the optimizer's order proves a loss, and accuses no optimizer of several."""

from __future__ import annotations

import copy
from itertools import chain

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from diagnosis.nets import conv_net
from stillnorm import check, replace
from stillnorm.diagnosis import Report
from stillnorm.diagnosis.finding import Finding
from stillnorm.repair import repair_optimizer
from support.zoo import images, make

LR = 0.1


def checked(net: nn.Module, optimizer: Optimizer) -> Report:
    report = check(net, optimizer=optimizer, select="SN304")
    assert report.crashed == ()
    return report


def the_finding(net: nn.Module, optimizer: Optimizer) -> Finding:
    (finding,) = checked(net, optimizer).findings
    assert (finding.code, finding.severity, finding.fix) == ("SN304", "warning", None)
    return finding


def undecided(net: nn.Module, optimizer: Optimizer) -> str:
    report = checked(net, optimizer)
    assert report.findings == ()
    return next((missed.reason for missed in report.not_run if missed.code == "SN304"), "")


def renewed(net: nn.Module, *paths: str) -> None:
    """Put new group norms in the place of norms."""
    for path in paths or ("1", "4"):
        net.set_submodule(path, nn.GroupNorm(1, net.get_submodule(path).num_features))


def stepped(net: nn.Module, optimizer: Optimizer) -> Optimizer:
    net(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    return optimizer


class TestFires:
    @pytest.mark.parametrize("kind", [SGD, AdamW])
    def test_norms_that_were_replaced(self, kind: type[Optimizer]) -> None:
        net = conv_net()
        optimizer = kind(net.parameters(), lr=LR)
        renewed(net)
        finding = the_finding(net, optimizer)
        assert finding.paths == ("1", "4")
        assert finding.evidence["untrained"] == ("1.weight", "1.bias", "4.weight", "4.bias")
        assert finding.evidence["orphans"] == 4

    def test_a_norm_that_was_removed(self) -> None:
        net = conv_net()
        optimizer = stepped(net, Adam(net.parameters(), lr=LR))
        net[1] = nn.Identity()
        finding = the_finding(net, optimizer)
        assert finding.paths == ("0",)
        assert finding.evidence == {
            "orphans": 2, "with_state": 2, "untrained": (), "unknown": 0,
        }  # fmt: skip

    def test_a_head_of_another_width(self) -> None:
        net = conv_net()
        optimizer = SGD(net.parameters(), lr=LR)
        net[8] = nn.Linear(8, 100)
        assert the_finding(net, optimizer).evidence["untrained"] == ("8.weight", "8.bias")

    def test_channels_that_were_pruned(self) -> None:
        """Every parameter around is another object, of another size."""
        net = conv_net()
        optimizer = SGD(net.parameters(), lr=LR)
        net[1], net[3] = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1)
        assert the_finding(net, optimizer).evidence["untrained"] == tuple(
            f"{path}.{name}" for path in "13" for name in ("weight", "bias")
        )

    def test_groups_with_and_without_decay(self) -> None:
        net = conv_net()
        matrices = [p for p in net.parameters() if p.dim() > 1]
        vectors = [p for p in net.parameters() if p.dim() < 2]
        optimizer = SGD([{"params": matrices}, {"params": vectors, "weight_decay": 0}], lr=LR)
        renewed(net)
        assert the_finding(net, optimizer).paths == ("1", "4")

    def test_names_are_proof_without_neighbours(self) -> None:
        net = conv_net()
        named = [(name, p) for name, p in net.named_parameters() if name == "8.weight"]
        optimizer = SGD([("0.weight", net[0].weight), *named], lr=LR)
        net[8] = nn.Linear(9, 5)
        assert the_finding(net, optimizer).evidence["untrained"] == ("8.weight",)

    def test_a_wrapped_model(self) -> None:
        net = conv_net()
        optimizer = SGD(net.parameters(), lr=LR)
        renewed(net)
        assert the_finding(nn.DataParallel(net), optimizer).paths == ("1", "4")

    def test_beside_another_modules_parameters(self) -> None:
        net, loss = conv_net(), nn.Linear(4, 4)
        optimizer = SGD([*net.parameters(), *loss.parameters()], lr=LR)
        net[1] = nn.Identity()
        finding = the_finding(net, optimizer)
        assert (finding.evidence["orphans"], finding.evidence["unknown"]) == (2, 2)

    @pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/lcnet_050"])
    def test_real_models(self, name: str) -> None:
        net = make(name)
        optimizer = SGD(net.parameters(), lr=LR)
        assert checked(net, optimizer).findings == ()
        norm = next(m for _, m in net.named_modules() if isinstance(m, nn.BatchNorm2d))
        (path,) = [path for path, m in net.named_modules() if m is norm]
        renewed(net, path)
        report = check(net, images(8), optimizer=optimizer)
        findings = {f.code: f for f in report.findings if f.severity != "info"}
        assert set(findings) == {"SN304"}
        assert findings["SN304"].evidence["untrained"][0].startswith(f"{path}.")


def test_what_the_help_says_makes_it_go_away() -> None:
    net = conv_net()
    optimizer = stepped(net, SGD(net.parameters(), lr=LR, momentum=0.9))
    renewed(net)
    assert the_finding(net, optimizer).evidence["with_state"] == 4
    missing = repair_optimizer(net, optimizer).missing
    assert missing == ("1.weight", "1.bias", "4.weight", "4.bias")
    optimizer.add_param_group({"params": [net.get_parameter(name) for name in missing]})
    assert checked(net, optimizer).findings == ()
    assert undecided(net, optimizer) == ""


class TestNearMisses:
    def test_an_optimizer_of_the_model(self) -> None:
        net = conv_net()
        assert undecided(net, SGD(net.parameters(), lr=LR)) == ""
        assert undecided(net, SGD(net[8].parameters(), lr=LR)) == ""

    @pytest.mark.parametrize("which", [0, 1])
    def test_one_optimizer_of_two_networks(self, which: int) -> None:
        nets = conv_net(), conv_net()
        optimizer = SGD(chain(*(net.parameters() for net in nets)), lr=LR)
        assert "nothing shows whether they were" in undecided(nets[which], optimizer)
        assert undecided(nn.ModuleList(nets), optimizer) == ""

    @pytest.mark.parametrize("place", ["before", "between", "after"])
    @pytest.mark.parametrize(
        "shapes", [[()], [(8,)], [(10, 4)], [(8, 8), (8,)], [(4,), (4,)]], ids=str
    )
    def test_a_loss_with_parameters(self, place: str, shapes: list[tuple[int, ...]]) -> None:
        net = conv_net()
        loss = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        body, head = [*net[:8].parameters()], [*net[8].parameters()]
        order = {"before": loss + body + head, "between": body + loss + head}
        optimizer = SGD(order.get(place, body + head + loss), lr=LR)
        assert "nothing shows whether they were" in undecided(net, optimizer)

    @pytest.mark.parametrize(
        "shapes", [[()], [(4,)], [(10, 4)], [(10, 4), (10,)], [(4,), (4, 8)]], ids=str
    )
    def test_a_loss_beside_a_head_that_another_optimizer_trains(
        self, shapes: list[tuple[int, ...]]
    ) -> None:
        net, loss = conv_net(), [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        optimizer = SGD([*net[:8].parameters(), *loss], lr=LR)
        assert "nothing shows" in undecided(net, optimizer)

    def test_a_loss_in_the_place_of_a_norm_that_another_optimizer_trains(self) -> None:
        net, loss = conv_net(), nn.Linear(8, 8)
        optimizer = SGD([*net[0].parameters(), *loss.parameters(), *net[2:].parameters()], lr=LR)
        assert "nothing shows" in undecided(net, optimizer)

    def test_an_optimizer_of_another_copy(self) -> None:
        net = conv_net()
        optimizer = SGD(copy.deepcopy(net).parameters(), lr=LR)
        assert undecided(net, optimizer) == "the optimizer holds no parameter of this model"

    def test_sync_batch_norm_has_the_same_parameters(self) -> None:
        net = conv_net()
        optimizer = SGD(net.parameters(), lr=LR)
        assert undecided(nn.SyncBatchNorm.convert_sync_batchnorm(net), optimizer) == ""

    def test_a_replacement_that_keeps_the_parameters(self) -> None:
        net = conv_net()
        optimizer = SGD(net.parameters(), lr=LR)
        replace(net, "group")
        assert undecided(net, optimizer) == ""

    def test_without_an_optimizer_it_is_not_run(self) -> None:
        report = check(conv_net(), select="SN304")
        assert next(missed.reason for missed in report.not_run) == "needs optimizer="

    def test_lazy_and_meta_models(self) -> None:
        for net in (nn.Sequential(nn.LazyLinear(4)), conv_net().to("meta")):
            assert undecided(net, SGD(net.parameters(), lr=LR)) == ""
