"""Small models as users write them, with statistics that are not the initial ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import stillnorm as sn
from stillnorm.export import ExportReport


def images(n: int = 2, seed: int = 3) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def settle(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give all batch norms statistics and affine parameters as after some training."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, _BatchNorm):
                for tensor, low, high in (
                    (norm.running_mean, -0.3, 0.3),
                    (norm.running_var, 0.5, 2.0),
                    (norm.weight, 0.7, 1.3),
                    (norm.bias, -0.3, 0.3),
                ):
                    if tensor is not None:
                        tensor.copy_(low + (high - low) * torch.rand(tensor.shape, generator=g))
    return model


class Net(nn.Module):
    """A convolution, a norm that exporters fold, one that they cannot, dropout and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.late = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Any:
        return self.head(x)

    def head(self, x: Tensor) -> Tensor:
        x = self.late(self.bn(self.conv(x)).relu())
        return self.fc(self.drop(x.mean((2, 3))))


def net() -> nn.Module:
    torch.manual_seed(0)
    return settle(Net()).train()


def net_with(forward: Callable[..., Any]) -> nn.Module:
    """The net with another forward."""
    torch.manual_seed(0)
    return settle(type("Net", (Net,), {"forward": forward})()).train()


class TwoViews(nn.Module):
    """One norm called twice, on inputs of different scale."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.again = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(5 * self.conv(x).relu())
        return self.bn(self.again(x).relu() + 3)


def exported(
    model: nn.Module, example: object, folder: Path, suffix: str, **options: Any
) -> ExportReport:
    """Export by the ending; `stillnorm.check` finds nothing in the file."""
    write = sn.export_onnx if suffix == ".onnx" else sn.export.export_program
    report = write(model, example, folder / f"net{suffix}", **options)
    checked = sn.check(report.path, select="SN701")
    assert not checked.findings
    assert not checked.not_run
    assert [path.name for path in folder.iterdir() if path.suffix == ".tmp"] == []
    return report
