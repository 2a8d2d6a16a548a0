"""Keras' batch norms get the moments of what they receive, the variance biased as they keep it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import pytest
import torch
from keras import layers
from torch import Tensor

import stillnorm as sn
from stillnorm.errors import CalibrationError
from stillnorm.norms import find_norms
from support.keras_nets import BATCHES, state, trained
from support.tolerances import STATISTICS_RTOL


@contextlib.contextmanager
def received(model: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Note what each norm is called on, (values, C), by replacing its call."""
    inputs: dict[str, list[Tensor]] = {norm.path: [] for norm in find_norms(model)}
    for norm in find_norms(model):
        layer: Any = norm.module

        def call(x: Tensor, *args: Any, of: Any = layer, path: str = norm.path, **kw: Any) -> Any:
            inputs[path].append(x.detach().movedim(of.axis, -1).flatten(0, -2).double())
            return type(of).call(of, x, *args, **kw)

        layer.__dict__["call"] = call
    try:
        yield inputs
    finally:
        for norm in find_norms(model):
            del norm.module.__dict__["call"]


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("method", ["pooled", "sequential"])
def test_statistics_are_the_moments_in_float64(method: Any, axis: int) -> None:
    model = trained(axis)
    batches = [x if axis == -1 else x.movedim(-1, 1) for x in BATCHES]
    before = state(model)
    report = sn.recalibrate(model, batches, method=method)
    assert [one.path for one in report.layers] == ["bn", "block.bn", "head"]
    with received(model) as inputs, sn.preserved(model), torch.no_grad():
        for x in batches:
            model(x, training=method == "pooled")
    for norm in find_norms(model):
        values = torch.cat(inputs[norm.path])
        mean, var = values.mean(0), values.var(0, correction=0)
        got = norm.tensors()
        torch.testing.assert_close(
            got["running_var"].double(), var, rtol=STATISTICS_RTOL, atol=0, check_dtype=False
        )
        # To the rounding of the buffer, in deviations.
        assert (
            (got["running_mean"] - mean).abs() <= STATISTICS_RTOL * (mean.abs() + var.sqrt())
        ).all()
    report.undo()
    assert all(map(torch.equal, state(model), before))


def test_what_is_frozen_is_left_unless_named() -> None:
    model = trained()
    model.get_layer("bn").trainable = False
    sn.freeze(model, "head")
    report = sn.recalibrate(model, BATCHES)
    assert [one.path for one in report.layers] == ["block.bn"]
    assert report.held == ("bn", "head")
    assert [one.path for one in sn.recalibrate(model, BATCHES, "head").layers] == ["head"]
    assert sn.is_frozen(model, "head")


def test_renorm_is_refused() -> None:
    """The next training step would make the variance of a deviation that is not recalibrated."""
    norm = layers.BatchNormalization(renorm=True)
    norm.build((None, 4))
    before = state(norm)
    report = sn.recalibrate(norm, [torch.randn(8, 4)])
    assert "renorm=True" in report.refused[0][1]
    assert all(map(torch.equal, state(norm), before))


def test_a_call_that_the_user_replaced_is_kept() -> None:
    model = trained()
    norm = model.get_layer("bn")

    def call(x: Any, training: Any = None, mask: Any = None) -> Any:
        return type(norm).call(norm, x, training=training)

    norm.__dict__["call"] = call
    sn.recalibrate(model, BATCHES)
    assert norm.__dict__["call"] is call


def test_what_is_masked_is_not_counted_but_refused() -> None:
    """Training leaves it out; no finding says that the statistics of training are wrong."""
    masking = layers.Masking()
    model = keras.Sequential([layers.Input((6, 3)), masking, layers.BatchNormalization(name="bn")])
    batches = [torch.randn(16, 6, 3) + 5 for _ in range(2)]
    for x in batches:
        x[:, 4:] = 0
    model.get_layer("bn").momentum = 0.9
    for x in batches * 40:
        model(x, training=True)
    before = state(model)
    with pytest.raises(CalibrationError, match="bn is given a mask"):
        sn.recalibrate(model, batches)
    assert all(map(torch.equal, state(model), before))
    assert not sn.check(model, batches).findings
