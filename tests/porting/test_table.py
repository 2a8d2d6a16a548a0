"""The table of differences speaks of the libraries that are installed: it is checked on them."""

from __future__ import annotations

import inspect
import json

import keras
import torch
from torch import nn

import stillnorm as sn
from stillnorm.diagnosis.codes import CODES


def row(what: str) -> sn.port.Difference:
    (found,) = (one for one in sn.port.table().differences if one.what == what)
    return found


def test_defaults_are_those_of_the_libraries() -> None:
    norm, there = nn.BatchNorm2d(1), keras.layers.BatchNormalization()
    assert (norm.momentum, norm.eps) == (0.1, 1e-5)
    assert (there.momentum, there.epsilon, there.axis) == (0.99, 1e-3, -1)
    assert (row("The default momentum").pytorch, row("The default eps").pytorch) == ("0.1", "1e-5")
    assert row("The default momentum").keras.startswith("0.99")
    assert row("The default eps").keras == "1e-3"


def test_the_variances_are_biased_and_unbiased() -> None:
    x = torch.tensor([[0.0], [2.0]])
    norm = nn.BatchNorm1d(1, momentum=1.0)
    norm(x)
    assert norm.running_var.item() == 2
    there = keras.Sequential([keras.Input((1,)), keras.layers.BatchNormalization(momentum=0.0)])
    there(x, training=True)
    assert float(there.layers[0].moving_variance.value) == 1


def test_trainable_false_is_inference_mode_in_keras_alone() -> None:
    x = torch.randn(8, 3)
    norm = nn.BatchNorm1d(3).requires_grad_(False)
    norm(x)
    assert norm.running_mean.abs().max() > 0
    there = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(trainable=False)])
    there(x, training=True)
    assert float(abs(there.layers[0].moving_mean.value).max()) == 0


def test_train_and_eval_change_nothing_in_keras() -> None:
    x = torch.randn(8, 3)
    there = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    outputs = [there.train(flag)(x).detach() for flag in (True, False)]
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], there(x, training=True).detach())


def test_every_difference_is_told_for_all_with_sources() -> None:
    differences = sn.port.table().differences
    assert len(differences) >= 10
    for one in differences:
        assert all((one.pytorch, one.keras, one.tensorflow1, one.flax, one.bites)), one.what
        assert one.sources
        assert all(s.startswith("https://") or s.endswith(".py") for s in one.sources)
    codes = [word for one in differences for word in one.bites.split() if word.startswith("(SN")]
    assert len(codes) >= 4
    assert all(code.strip("();,") in CODES for code in codes)


def test_update_ops_of_thread_001() -> None:
    one = row("What updates them")
    assert "UPDATE_OPS" in one.tensorflow1
    assert "SN101" in one.bites
    assert "keep_prob" in row("Dropout").tensorflow1
    # A layer that is not trainable hands out no updates: tf.layers.Layer.updates is empty.
    assert "UPDATE_OPS gets no updates" in row("What trainable=False does").tensorflow1


def test_written() -> None:
    table = sn.port.table()
    text = str(table)
    assert all(one.what in text for one in table.differences)
    assert max(map(len, text.splitlines())) <= 140
    assert len(json.loads(table.to_json())["differences"]) == len(table.differences)
    page = table.to_html()
    assert "<h1>What batch norm and dropout are in four frameworks</h1>" in page
    assert inspect.getdoc(sn.port.table)


def test_sources_are_numbered_once_in_text_and_listed_by_difference_in_json() -> None:
    table = sn.port.table()
    text, used = str(table), {s for one in table.differences for s in one.sources}
    body, _, listed = text.partition("\nSources\n")
    assert "https://" not in body
    numbered = dict(line.split(maxsplit=1) for line in listed.splitlines())
    assert set(numbered.values()) == used
    assert list(numbered) == [str(i) for i in range(1, len(used) + 1)]
    told = json.loads(table.to_json())["differences"][0]["sources"]
    first = next(line for line in body.splitlines() if line.startswith("sources: "))
    assert [numbered[i] for i in first.removeprefix("sources: ").split(", ")] == told
    assert "tf.keras 2" in row("The variance that is kept").keras
