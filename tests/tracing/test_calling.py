"""Calling a model: the right arguments, or an error whose `forward=` line works when copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillnorm.errors import BatchError
from stillnorm.tracing import call

X = torch.randn(4, 3)
Y = torch.zeros(4, dtype=torch.long)


class Sum(nn.Module):
    """Siamese: two inputs."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Named(nn.Module):
    """As models of transformers are called."""

    def forward(self, pixel_values: Tensor, mask: Tensor | None = None) -> Tensor:
        return pixel_values if mask is None else pixel_values * mask


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Open(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args, kwargs


def test_default_calls() -> None:
    assert torch.equal(call(One(), X), 2 * X)
    assert torch.equal(call(One(), (X, Y)), 2 * X)
    assert torch.equal(call(One(), [X, Y]), 2 * X)
    assert torch.equal(call(One(), [X]), 2 * X)
    assert torch.equal(call(Named(), {"pixel_values": X, "mask": X}), X * X)
    assert call(Open(), {"a": X}) == ((), {"a": X})


def test_forward_decides_alone() -> None:
    batch = ("anything", X)
    assert torch.equal(call(One(), batch, forward=lambda model, batch: model(batch[1])), 2 * X)


COPY = {
    "two inputs as a pair": (Sum(), (X, X), 2 * X),
    "two inputs as a list": (Sum(), [X, X, Y], 2 * X),
    "a mapping with more keys than arguments": (Named(), {"pixel_values": X, "labels": Y}, X),
    "a mapping of other names": (One(), {"image": X}, 2 * X),
    "a mapping and a target": (Named(), ({"pixel_values": X}, Y), X),
    "three items": (One(), (X, Y, Y), 2 * X),
}


@pytest.mark.parametrize(("model", "batch", "output"), COPY.values(), ids=COPY)
def test_the_line_in_the_error_works_when_copied(
    model: nn.Module, batch: object, output: Tensor
) -> None:
    with pytest.raises(BatchError) as caught:
        call(model, batch)
    line = caught.value.help
    assert line.startswith("forward=lambda model, batch: ")
    forward = eval(line.removeprefix("forward="))
    assert torch.equal(call(model, batch, forward), output)


def test_the_error_says_what_does_not_fit() -> None:
    with pytest.raises(BatchError) as caught:
        call(Sum(), (X, Y))
    assert "the forward of Sum, (a, b)," in caught.value.fact
    assert "a tuple of 2: (4, 3), (4,)" in caught.value.fact
    assert "'b'" in caught.value.fact


def test_the_signature_is_checked_before_anything_runs() -> None:
    ran = []
    model = Sum()
    model.register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(BatchError):
        call(model, X)
    assert not ran


def test_a_tensor_for_a_model_of_two_inputs_shows_the_missing_one() -> None:
    with pytest.raises(BatchError) as caught:
        call(Sum(), X)
    assert caught.value.help == "forward=lambda model, batch: model(batch, b=...)"


def test_the_signature_of_a_wrapped_model_is_the_models() -> None:
    with pytest.raises(BatchError, match=r"\(a, b\)"):
        call(nn.DataParallel(Sum()), (X, X))


class Owner(nn.Module):
    """A user's own model that happens to call its only child "module"."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x, x)


def test_a_child_called_module_is_not_mistaken_for_the_model() -> None:
    assert torch.equal(call(Owner(), X), 2 * X)


@pytest.mark.parametrize(
    "batch",
    [X.to("meta"), (X.to("meta"), Y), {"input": X.to("meta")}],
    ids=["tensor", "pair", "mapping"],
)
def test_a_batch_on_another_device_is_not_moved_but_said(batch: object) -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(BatchError, match="the model is on cpu, the batch on meta") as caught:
        call(model, batch)
    assert ".to('cpu')" in caught.value.help
    assert "forward=lambda model, batch: model(" in caught.value.help


def test_a_model_on_several_devices_takes_its_inputs_where_it_wants() -> None:
    model = nn.Sequential(nn.Linear(3, 2, device="meta"), nn.Linear(3, 2))
    with pytest.raises(Exception, match=r"(?i)meta|device") as caught:
        call(model, X)
    assert not isinstance(caught.value, BatchError)


def test_scripted_models_are_called() -> None:
    assert torch.equal(call(torch.jit.script(One()), X), 2 * X)
