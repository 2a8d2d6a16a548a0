"""Counting what autograd keeps: to the byte, and nothing stays behind."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor, nn

from stillnorm.tracing.saved import saved_bytes


def test_bytes_are_counted_once_and_without_parameters() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    x = torch.randn(8, 3, requires_grad=True)
    # x, for the first weight; the sigmoid's output, for itself and for the second weight.
    assert saved_bytes(net, lambda: net(x)) == 4 * 8 * (3 + 4)


def test_under_a_transform_there_is_nothing_to_count() -> None:
    net = nn.Linear(3, 4)
    x = torch.randn(8, 3)
    assert saved_bytes(net, lambda: torch.func.vmap(net)(x)) >= 0


def test_no_graph_stays_behind() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), nn.Linear(4, 2))
    seen: list[weakref.ref[Tensor]] = []
    net[1].register_forward_hook(lambda module, args, y: seen.append(weakref.ref(y)))
    saved_bytes(net, lambda: net(torch.randn(8, 3)))
    gc.collect()
    assert [reference() for reference in seen] == [None]
