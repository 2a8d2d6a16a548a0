"""A small network whose norms all fold, and plain torch's word on what it should give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import stillnorm as sn
from support import layers

DTYPE = torch.float64


def net(seed: int = 1) -> nn.Sequential:
    return layers.conv_net(seed).to(DTYPE)  # type: ignore[return-value]


def x(seed: int = 2) -> Tensor:
    return layers.conv_input(seed=seed).to(DTYPE)


def folded(model: nn.Module, example: object = None, **options: Any) -> nn.Module:
    """Freeze with folding; all the norms of these models fold."""
    report = sn.freeze(
        model, fold_on=x() if example is None else example, fold_when="always", **options
    )
    assert report.not_folded == ()
    assert report.folded
    return model.train()


def gradients(model: nn.Module, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Output and gradients to the input and to every parameter that has one."""
    leaf = x().requires_grad_()
    model.zero_grad()
    y = (run or model)(leaf)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"output": y.detach(), "input": leaf.grad, **grads}  # type: ignore[dict-item]


def agree(a: dict[str, Tensor], b: dict[str, Tensor], affine: str = "frozen") -> None:
    if affine == "frozen":
        b = {k: t for k, t in b.items() if k in a or not _is_affine(k)}
    assert a.keys() == b.keys()
    for key in a:
        scale = max(1.0, float(b[key].abs().max()))
        torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-11 * scale, msg=key)


def _is_affine(key: str) -> bool:
    return key.rpartition(".")[0] in ("1", "3.1", "6")


AFFINE = ("frozen", "trains")


class Variant(nn.Module):
    """conv, then something, then norm."""

    def __init__(self, between: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.between = between
        layers.settle(self).to(DTYPE)
        self.on = False

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv(x)
        return self.between(self, z, x) if self.on else self.norm(z)  # type: ignore[no-any-return]


def skipped(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return z.exp()
