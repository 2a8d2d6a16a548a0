"""A layer of Keras, once held, is in inference mode whatever Keras is told, and bit for bit so."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import Tensor, nn

import stillnorm as sn
from stillnorm.errors import RefusedError, VerifyError
from stillnorm.holding import keras as holding
from stillnorm.norms import find_norms
from support.interruptions import Interruption
from support.keras_nets import BATCHES, images, make, state, trained

X = BATCHES[0]


def norms(model: Any) -> list[Any]:
    return [norm.module for norm in find_norms(model)]


def looks(model: Any) -> list[Any]:
    """What a freeze may change and an unfreeze has to give back."""
    return [
        (id(n), type(n), n.trainable, [(v.trainable, v.value.grad) for v in n.variables])
        for n in norms(model)
    ] + [id(variable.value) for variable in model.variables]


def fit(model: Any) -> None:
    optimizer = keras.optimizers.AdamW(0.01, weight_decay=0.1)
    model.compile(optimizer, "mse")
    model.fit(images(32), torch.randn(32, 2), epochs=2, verbose=0)


def fine_tune(model: Any) -> None:
    """What Keras' guide on transfer learning does, which thaws every batch norm."""
    model.trainable = True
    fit(model)


def own_loop(model: Any) -> None:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    for x in BATCHES:
        optimizer.zero_grad()
        model(x, training=True).square().sum().backward()
        optimizer.step()


def by_position(model: Any) -> None:
    for norm in norms(model):
        shape = [2] * norm.input_spec.ndim
        shape[norm.axis] = norm.moving_mean.shape[0]
        norm.call(torch.randn(shape), True)


def variables_one_by_one(model: Any) -> None:
    for norm in norms(model):
        norm.gamma.trainable = norm.beta.trainable = True
    own_loop(model)


# ------------------------------------------------------------------------------- it stays


def test_the_eval_output_does_not_change_by_one_bit() -> None:
    model = trained()
    before = model(X, training=False)
    assert not torch.equal(model(X, training=True), before)
    model = trained()
    assert sn.freeze(model).frozen == ("bn", "block.bn", "head")
    for training in (None, False, True):
        assert torch.equal(model(X, training=training), before)


@pytest.mark.parametrize("happens", [fit, fine_tune, own_loop, by_position, variables_one_by_one])
def test_statistics_and_affine_are_bit_equal_afterwards(happens: Callable[[Any], None]) -> None:
    model = trained()
    happens(plain := trained())
    assert sn.snapshot(model).diff(plain)  # without a hold they move
    sn.freeze(model)
    snapshot = sn.snapshot(model)
    happens(model)
    snapshot.verify(model)
    assert sn.is_frozen(model)
    assert not [c for c in snapshot.diff(model).changes if hasattr(c, "tensor")]


def test_what_trains_is_the_rest() -> None:
    model = trained()
    sn.freeze(model)
    model.trainable = True
    named = {variable.path.rsplit("/", 1)[-1] for variable in model.trainable_variables}
    assert named == {"kernel", "bias"}
    before = [v.value.detach().clone() for v in model.trainable_variables]
    fit(model)
    after = [v.value for v in model.trainable_variables]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_gradients_are_those_of_inference_mode() -> None:
    def gradients(model: Any, training: bool) -> list[Tensor]:
        model(X, training=training).square().sum().backward()
        return [v.value.grad for v in model.variables if v.path.endswith("/kernel")]

    held = trained()
    sn.freeze(held)
    pairs = zip(gradients(held, True), gradients(trained(), False), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(norm.gamma.value.grad is None for norm in norms(held))


def test_affine_trains_and_statistics_stay() -> None:
    model = trained()
    before = model(X)
    sn.freeze(model, affine="trains")
    assert torch.equal(model(X, training=True), before)
    snapshot = sn.snapshot(model)
    fine_tune(model)
    snapshot.verify(model)
    moved = {c.tensor for c in snapshot.diff(model).changes if hasattr(c, "tensor")}
    assert moved == {"weight", "bias"}
    assert "held=(statistics)" in repr(model.get_layer("bn"))


def test_nothing_is_saved_for_backward_but_vectors() -> None:
    """Of an activation of 256 channels-last values a channel, not one byte."""

    def saved(training: bool, *, held: bool) -> int:
        norm = layers.BatchNormalization()
        norm.build((None, 8, 8, 16))
        if held:
            sn.freeze(norm)
        seen: dict[int, int] = {}
        x = torch.randn(4, 8, 8, 16, requires_grad=True)

        def pack(tensor: Tensor) -> Tensor:
            seen[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            norm(x, training=training)
        return sum(seen.values())

    with pytest.warns(sn.StillnormWarning, match="never estimated"):
        assert saved(True, held=True) == 16 * 4
    assert saved(True, held=False) > 4 * 8 * 8 * 16 * 4


def test_a_wrapped_torch_norm_is_held_too() -> None:
    norm = nn.BatchNorm1d(4)
    norm(torch.randn(64, 4))
    model = keras.Sequential([layers.Input((4,)), layers.TorchModuleWrapper(norm), layers.Dense(2)])
    sn.freeze(model)
    snapshot = sn.snapshot(model)
    model(torch.randn(8, 4), training=True)
    snapshot.verify(model)


# ------------------------------------------------------------------------------- unfreeze


def mixed() -> Any:
    model = trained()
    model.get_layer("bn").gamma.trainable = False
    model.get_layer("head").trainable = False
    model(X, training=True).sum().backward()
    return model


@pytest.mark.parametrize("affine", ["frozen", "trains"])
def test_unfreeze_gives_back_what_was(affine: Any) -> None:
    model = mixed()
    assert model.get_layer("bn").beta.value.grad is not None
    kept = [variable.value.grad for variable in model.variables]
    before = [
        (id(n), type(n), n.trainable, [v.trainable for v in n.variables]) for n in norms(model)
    ]
    sn.freeze(model, affine=affine)
    sn.freeze(model, affine="trains" if affine == "frozen" else "frozen")
    assert model.get_layer("bn").beta.value.grad is None  # an optimizer would step with it
    assert len(sn.unfreeze(model).unfrozen) == 3
    assert before == [
        (id(n), type(n), n.trainable, [v.trainable for v in n.variables]) for n in norms(model)
    ]
    gone = [
        v.path for v, grad in zip(model.variables, kept, strict=True) if v.value.grad is not grad
    ]
    assert all(path.endswith(("gamma", "beta")) for path in gone)
    assert not torch.equal(model(X, training=True), model(X, training=False))


@pytest.mark.parametrize("value", [True, False])
def test_unfreeze_gives_what_trainable_asked_for_since(value: bool) -> None:
    model, plain = mixed(), mixed()
    sn.freeze(model)
    for one in (model, plain):
        one.trainable = not value
        one.trainable = value
    sn.unfreeze(model)
    assert [v.trainable for v in model.variables] == [v.trainable for v in plain.variables]
    assert [n.trainable for n in norms(model)] == [n.trainable for n in norms(plain)] == [value] * 3


def test_frozen_by_keras_is_not_held_and_thaws() -> None:
    model = trained()
    model.get_layer("bn").trainable = False
    assert sn.inspect(model).layers[0].held == "trainable=False"
    assert sn.freeze(model, "bn").frozen == ("bn",)
    assert sn.inspect(model).layers[0].held == "stillnorm"
    model.trainable = True
    assert sn.is_frozen(model, "bn")
    assert not sn.is_frozen(model)


# ------------------------------------------------------------------------------- all or nothing


@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("before", [True, False])
def test_an_exception_in_the_middle_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, nth: int, before: bool
) -> None:
    model = mixed()
    looked, values = looks(model), state(model)
    Interruption(monkeypatch, holding, "hold", nth, KeyboardInterrupt, before=before)
    with pytest.raises(KeyboardInterrupt):
        sn.freeze(model)
    assert looks(model) == looked
    assert all(map(torch.equal, state(model), values))


def test_refusals() -> None:
    class Own(layers.BatchNormalization):
        def call(self, inputs: Any) -> Any:  # type: ignore[override]
            return super().call(inputs, training=True)

    model = keras.Sequential([layers.Input((4,)), Own(name="own")])
    model(torch.randn(64, 4))
    with pytest.raises(RefusedError, match="takes no training="):
        sn.freeze(model, affine="trains", strict=True)
    sn.freeze(model)
    snapshot = sn.snapshot(model)
    model(torch.randn(8, 4))
    snapshot.verify(model)
    unbuilt = layers.BatchNormalization()
    assert "lazy" in sn.freeze(unbuilt).refused[0][1]
    replaced = layers.BatchNormalization()
    replaced.build((None, 4))
    replaced.call = lambda inputs, training=None: inputs
    assert "its call was replaced" in sn.freeze(replaced).refused[0][1]


# ------------------------------------------------------------------------------- state and files


def test_snapshots_know_the_hold_and_restore_it(tmp_path: Path) -> None:
    model = mixed()
    plain, looked = sn.snapshot(model), looks(model)
    sn.freeze(model)
    held = sn.snapshot(model)
    held.save(tmp_path / "held.safetensors")
    sn.unfreeze(model)
    model.trainable = True
    fit(model)
    with pytest.raises(VerifyError, match="its hold is gone"):
        held.verify(model)
    sn.Snapshot.load(tmp_path / "held.safetensors").restore(model)
    held.verify(model)
    assert sn.is_frozen(model)
    plain.restore(model)
    assert not sn.is_frozen(model)
    assert [row[2] for row in looks(model)[:3]] == [row[2] for row in looked[:3]]
    assert not plain.diff(model)


def test_snapshots_restore_momentum_and_eps() -> None:
    model = trained()
    snapshot = sn.snapshot(model)
    norm = model.get_layer("bn")
    norm.momentum, norm.epsilon = 0.5, 1e-5
    assert {change.switch for change in snapshot.diff(model).changes} == {"momentum", "eps"}
    snapshot.restore(model)
    assert (norm.momentum, norm.epsilon) == (0.9, 1e-3)


def test_files_copies_and_clones_are_plain_keras(tmp_path: Path) -> None:
    """Read without stillnorm: a layer of Keras with trainable=False."""
    model = trained()
    sn.freeze(model)
    expected = model(X)
    model.save(tmp_path / "held.keras")
    read = keras.models.load_model(tmp_path / "held.keras")
    for other in (read, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X, training=True), expected)
        for norm in norms(other):
            assert type(norm) is layers.BatchNormalization
            assert not norm.trainable
    clone = keras.models.clone_model(model)
    assert {type(norm) for norm in norms(clone)} == {layers.BatchNormalization}
    model.save_weights(tmp_path / "held.weights.h5")
    fresh = make(momentum=0.9)
    fresh.load_weights(tmp_path / "held.weights.h5")
    assert torch.equal(fresh(X), expected)


@keras.saving.register_keras_serializable("stillnorm_tests")
class Registered(layers.BatchNormalization):
    """A user's own class."""


def test_a_registered_class_is_found_again(tmp_path: Path) -> None:
    model = keras.Sequential([layers.Input((4,)), Registered(name="own")])
    model(torch.randn(64, 4), training=True)
    sn.freeze(model)
    model.save(tmp_path / "own.keras")
    read = keras.models.load_model(tmp_path / "own.keras")
    assert type(read.get_layer("own")) is Registered
    assert keras.saving.get_registered_object("stillnorm_tests>Registered") is Registered
    x = torch.randn(3, 4)
    assert torch.equal(read(x, training=True), model(x))


def test_loading_weights_is_obeyed_and_named() -> None:
    model = trained()
    sn.freeze(model)
    snapshot = sn.snapshot(model)
    model.get_layer("bn").set_weights([np.ones(4)] * 4)
    with pytest.raises(VerifyError, match="running_mean"):
        snapshot.verify(model)


def test_a_compiled_step_keeps_it() -> None:
    model = trained()
    sn.freeze(model)
    step = torch.compile(lambda x: model(x, training=True), backend="eager")
    assert torch.equal(step(X), model(X))
