"""writes_undone: any in-place write to any tensor is taken back, at the cost of what is written."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stillnorm.norms import random_kept
from stillnorm.norms.undo import writes_undone
from support.fingerprint import Fingerprint

WRITES: dict[str, Callable[[nn.Linear], object]] = {
    "in place": lambda m: m.weight.data.mul_(2),
    "under no_grad": lambda m: torch.no_grad()(lambda: m.weight.mul_(2))(),
    "twice": lambda m: (m.weight.data.mul_(2), m.weight.data.add_(1)),
    "through a view": lambda m: m.weight.data[0].zero_(),
    "by item": lambda m: m.weight.data.__setitem__((0, 0), 5.0),
    "copy_": lambda m: m.weight.data.copy_(torch.ones(3, 2)),
    "out=": lambda m: torch.add(m.bias.data, 1, out=m.bias.data),
    "foreach": lambda m: torch._foreach_mul_([m.weight.data, m.bias.data], 3.0),
    "init": lambda m: nn.init.normal_(m.weight),
    "optimizer": lambda m: _step(m),
    "data": lambda m: setattr(m.weight, "data", torch.zeros(3, 2)),
    "data, then in place": lambda m: (
        setattr(m.weight, "data", m.weight.data * 2),
        m.weight.data.add_(1),
    ),
    "in place, then data": lambda m: (
        m.weight.data.add_(1),
        setattr(m.weight, "data", torch.zeros(3, 2)),
    ),
    "cast": lambda m: setattr(m.weight, "data", m.weight.data.double()),
    "buffer": lambda m: m.counter.add_(1),
    "nothing": lambda m: m.weight.data * 2,
}


def _step(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.Adam(module.parameters()).step()
    module.zero_grad()


def linear() -> nn.Linear:
    module = nn.Linear(2, 3)
    module.register_buffer("counter", torch.zeros((), dtype=torch.long))
    return module


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("how", WRITES)
def test_every_way_to_write(how: str, raises: bool) -> None:
    """Bits, storage, version counter: as before, also after an exception."""
    module = linear()
    before = Fingerprint(module)
    try:
        with writes_undone([*module.parameters(), *module.buffers()]):
            WRITES[how](module)
            if raises:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert raises
    different = Fingerprint(module).differences(before)
    assert [where for where in different if where != "random state"] == []


def test_tensors_that_were_not_named_too() -> None:
    other = torch.ones(3)
    with writes_undone([]):
        other.mul_(5)
        assert other.tolist() == [5, 5, 5]
    assert other.tolist() == [1, 1, 1]


def test_an_outstanding_graph_still_runs() -> None:
    weight = torch.ones(3, requires_grad=True)
    y = (weight * weight).sum()
    with writes_undone([weight]), torch.no_grad():
        weight.add_(1)
    y.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2, 2, 2]


def test_copies_only_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[int] = []
    real = torch.UntypedStorage.clone

    def clone(self: torch.UntypedStorage) -> torch.UntypedStorage:
        copied.append(self.nbytes())
        return real(self)

    monkeypatch.setattr(torch.UntypedStorage, "clone", clone)
    big, small = torch.zeros(1000), torch.zeros(3)
    with writes_undone([big, small]):
        small.add_(1)
        small.add_(1)
        (big + 1).sum()
    assert copied == [12]


def test_meta_and_lazy_tensors_are_no_obstacle() -> None:
    meta, lazy = nn.Linear(2, 2, device="meta"), nn.LazyLinear(2)
    tensors: list[Tensor] = [*meta.parameters(), *lazy.parameters()]
    with writes_undone(tensors):
        meta.weight.data.add_(1)
    assert isinstance(lazy.weight, nn.UninitializedParameter)


def test_random_states() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with random_kept():
        torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
