"""SN210: lazy norms before their first forward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diagnosis.nets import conv_net
from stillnorm import check
from support.fingerprint import Fingerprint

LAZY = [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d, nn.LazyInstanceNorm2d]


@pytest.mark.parametrize("kind", LAZY)
@pytest.mark.parametrize("affine", [True, False])
def test_layers_that_wait_are_named(kind: type[nn.Module], affine: bool) -> None:
    net = nn.Sequential(nn.Identity(), kind(affine=affine), nn.BatchNorm1d(3))
    before = Fingerprint(net)
    report = check(net)
    assert not report.crashed
    lazy = [f for f in report.findings if f.code == "SN210"]
    assert [(f.severity, f.paths) for f in lazy] == [("info", ("1",))]
    assert Fingerprint(net) == before


def test_once_called_it_is_an_ordinary_layer() -> None:
    net = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d())
    net.eval()(torch.randn(2, 3, 4, 4))
    assert check(net, select="SN210").findings == ()


def test_ordinary_layers_are_not_lazy() -> None:
    assert check(conv_net(), select="SN210").findings == ()
    assert check(nn.Sequential(nn.LazyLinear(3), nn.BatchNorm1d(3)), select="SN210").findings == ()
