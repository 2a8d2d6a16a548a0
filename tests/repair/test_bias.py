"""Biases before norms: gone, and nothing computes anything else."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillnorm.errors import StateError
from stillnorm.repair import absorb_bias, bias, surgery
from support.fingerprint import Fingerprint
from support.interruptions import Interruption
from support.layers import conv_input, settle
from support.zoo import images, torchvision


def net() -> nn.Module:
    torch.manual_seed(0)
    return settle(
        nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
            nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6),
            nn.Conv2d(6, 5, 1), nn.ReLU(), nn.BatchNorm2d(5),
            nn.Flatten(), nn.LazyLinear(7), nn.BatchNorm1d(7, affine=False),
        )
    )  # fmt: skip


def made() -> nn.Module:
    found = net()
    found.eval()(conv_input())
    return settle(found)


def test_eval_stays_and_train_mode_stays() -> None:
    model, x = made(), conv_input(8)
    plain = copy.deepcopy(model)
    report = absorb_bias(model, x)
    assert report.repaired == (
        ("0", "bias into 1"), ("3", "bias into 4"), ("9", "bias into 10"),
    )  # fmt: skip
    assert report.refused == ()
    assert model[0].bias is model[3].bias is model[9].bias is None
    assert model[5].bias is not None, "the near miss: a ReLU stands between"
    torch.testing.assert_close(model.eval()(x), plain.eval()(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.train()(x), plain.train()(x), rtol=1e-3, atol=1e-4)
    for a, b in zip(model, plain, strict=True):
        if isinstance(a, nn.modules.batchnorm._BatchNorm):
            torch.testing.assert_close(a.running_var, b.running_var, rtol=1e-4, atol=1e-5)


def test_the_mean_is_the_mean_less_the_bias() -> None:
    model = made().double()
    want = model[1].running_mean - model[0].bias
    pointer = model[1].running_mean.data_ptr()
    absorb_bias(model, conv_input().double())
    assert torch.equal(model[1].running_mean, want)
    assert model[1].running_mean.data_ptr() == pointer


def test_what_stays_is_named_with_the_reason() -> None:
    class Used(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.a = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.left, self.right = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.both = nn.BatchNorm2d(3)
            self.tied, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.tied.bias = self.twice.bias
            self.bare, self.c = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.twice(x)
            x = self.a(y) + y
            x = self.both(self.left(x)) + self.both(self.right(x))
            return self.c(self.bare(self.b(self.tied(x))))

    model = settle(Used())
    before = Fingerprint(model)
    report = absorb_bias(model, conv_input())
    assert report.repaired == ()
    assert dict(report.refused) == {
        "twice": "its output is used by somebody else than a",
        "left": "both receives something else too",
        "right": "both receives something else too",
        "tied": "its bias is another layer's too",
    }
    assert not Fingerprint(model).differences(before)


def test_a_layer_called_twice_into_one_norm() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)) + self.norm(self.conv(2 * x))

    model, x = settle(Twice()), conv_input()
    want = model.eval()(x)
    assert len(absorb_bias(model, x).repaired) == 1
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "biases"), [("vgg11_bn", 8), ("resnet18", 0)])
def test_real_networks(name: str, biases: int) -> None:
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=10).eval()
    x = images(2)
    want = model(x)
    report = absorb_bias(model, x)
    assert len(report.repaired) == biases
    torch.testing.assert_close(model(x), want, rtol=1e-3, atol=1e-4 * float(want.abs().max()))


class InTraining(nn.Module):
    """Something stands between the two in train mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.norm(F.dropout(x) if self.training else x)


class UsedElsewhere(InTraining):
    def forward(self, x: Tensor) -> Tensor:
        aside = F.conv2d(x, self.conv.weight, self.conv.bias).argmax(1)
        return self.norm(self.conv(x)) + aside[:, None]


@pytest.mark.parametrize("kind", [InTraining, UsedElsewhere])
def test_what_train_mode_or_others_do_with_it(kind: type[nn.Module]) -> None:
    model = settle(kind())
    x = conv_input()
    before = Fingerprint(model)
    report = absorb_bias(model, x)
    assert report.repaired == ()
    assert [path for path, _ in report.refused] == ["conv"]
    assert not Fingerprint(model).differences(before)


def test_a_bias_that_rounding_would_lose_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    with torch.no_grad():
        model[0].bias.fill_(1e6)
        model[1].running_mean.fill_(1e6)
        model[1].running_var.fill_(1e-6)
    x = torch.randn(4, 3)
    before = Fingerprint(model, versions=False)
    with pytest.raises(StateError, match="moves by"):
        absorb_bias(model, x)
    assert not Fingerprint(model, versions=False).differences(before)


@pytest.mark.parametrize("before", [float("inf"), float("nan"), 1.0])
def test_values_that_are_not_finite_must_be_so_on_both_sides(before: float) -> None:
    a, b = torch.tensor([before, 2.0]), torch.tensor([before, 2.0])
    bias._must_agree([a], [b])
    b[0] = 1.0 if not math.isfinite(before) else float("inf")
    with pytest.raises(StateError, match="moves by inf"):
        bias._must_agree([a], [b])


def test_undo() -> None:
    model = made()
    before = Fingerprint(model, versions=False)
    absorb_bias(model, conv_input()).undo()
    assert not Fingerprint(model, versions=False).differences(before)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("where", "name", "nth"),
    [
        (surgery.Surgery, "write", 1), (surgery.Surgery, "write", 3),
        (surgery.Surgery, "set_item", 2), (bias, "_must_agree", 1), (bias, "_output", 2),
        (bias.RepairReport, "__init__", 1),
    ],
)  # fmt: skip
def test_an_error_at_any_step_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], where: Any, name: str, nth: int
) -> None:
    model = made()
    before = Fingerprint(model, versions=False)
    interruption = Interruption(monkeypatch, where, name, nth, kind)
    with pytest.raises(kind):
        absorb_bias(model, conv_input())
    monkeypatch.undo()
    assert interruption.calls >= nth
    assert not Fingerprint(model, versions=False).differences(before)


def test_only_before_the_norms_that_are_chosen() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8))
    report = absorb_bias(net, torch.randn(16, 4), "3")
    assert report.repaired == (("2", "bias into 3"),)
    assert report.refused == ()
    assert net[0].bias is not None
