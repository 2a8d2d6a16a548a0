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


# ------------------------------------------------------------------------------- users' classes


@keras.saving.register_keras_serializable("stillnorm_tests")
class Mixed(layers.BatchNormalization):
    """A norm with layers in it, one of them frozen, and two variables of one path."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.learns, self.stays = layers.Dense(4), layers.Dense(4, trainable=False)

    def build(self, shape: Any) -> None:
        super().build(shape)
        self.learns.build(shape)
        self.stays.build(shape)
        self.other = self.add_weight(shape=(4,), name="gamma")

    def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
        return super().call(self.stays(self.learns(x)), training=training) * self.other


def with_layers_inside() -> tuple[Any, Any]:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([layers.Input((4,)), Mixed(name="own"), layers.Dense(2)])
    model(torch.randn(64, 4), training=True).sum().backward()
    own = model.get_layer("own")
    own.other.trainable = False
    return model, own


def inside(own: Any) -> list[Any]:
    return [
        *((layer.trainable, id(layer)) for layer in (own, own.learns, own.stays)),
        *((v.trainable, v.value.requires_grad, v.value.grad) for v in own.variables),
    ]


def test_layers_inside_a_norm_are_given_back_their_own_trainable() -> None:
    model, own = with_layers_inside()
    before = [entry[:2] for entry in inside(own)]
    sn.freeze(model)
    assert not any(entry[0] for entry in inside(own))
    assert all(variable.value.grad is None for variable in own.variables)
    sn.unfreeze(model)
    assert [entry[:2] for entry in inside(own)] == before


def test_layers_inside_a_norm_stay_too() -> None:
    model, own = with_layers_inside()
    sn.freeze(model)
    before = state(own)
    own.learns.trainable = own.other.trainable = True
    model.compile("sgd", "mse")
    model.fit(torch.randn(16, 4), torch.randn(16, 2), verbose=0)
    assert all(map(torch.equal, state(own), before))
    sn.unfreeze(model)
    assert own.learns.trainable  # as asked for meanwhile
    assert own.other.trainable


def test_an_exception_gives_layers_inside_their_own_trainable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, own = with_layers_inside()
    before = inside(own)
    Interruption(monkeypatch, holding, "hold", 1, KeyboardInterrupt, before=False)
    with pytest.raises(KeyboardInterrupt):
        sn.freeze(model)
    assert inside(own) == before


def test_what_was_set_past_the_layer_while_held_is_kept_on_release() -> None:
    norm = trained().get_layer("bn")
    norm.gamma.trainable = False
    sn.freeze(norm)
    norm.gamma.trainable = True
    sn.unfreeze(norm)
    assert norm.gamma.trainable


def test_a_call_that_asks_for_the_batch_gets_the_running_statistics() -> None:
    class Stubborn(layers.BatchNormalization):
        def call(self, x: Any, training: Any = None, mask: Any = None) -> Any:
            return super().call(x, training=True)

    model = keras.Sequential([layers.Input((4,)), Stubborn()])
    model(torch.randn(64, 4))
    sn.freeze(model, affine="trains", strict=True)
    snapshot = sn.snapshot(model)
    model(torch.randn(8, 4), training=True)
    snapshot.verify(model)


def test_a_class_whose_trainable_cannot_be_set_is_refused() -> None:
    class Always(layers.BatchNormalization):
        trainable = property(lambda self: True)  # type: ignore[assignment]

    norm = Always()
    norm.build((None, 4))
    assert "trainable" in sn.freeze(norm).refused[0][1]
    assert type(norm) is Always


def test_a_file_names_the_layer_as_keras_does() -> None:
    held, plain = trained(), trained()
    sn.freeze(held)
    for norm in norms(plain):
        norm.trainable = False
    for a, b in zip(norms(held), norms(plain), strict=True):
        written, expected = map(keras.saving.serialize_keras_object, (a, b))
        assert {**written, "build_config": 0} == {**expected, "build_config": 0}
        assert written["module"] == "keras.layers"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_layer_alone_is_plain_keras(copied: Callable[[Any], Any]) -> None:
    norm = trained().get_layer("bn")
    sn.freeze(norm)
    other = copied(norm)
    assert type(other) is layers.BatchNormalization
    assert torch.equal(other.moving_mean.value, norm.moving_mean.value)


# ------------------------------------------------------------------------------- renorm


def test_statistics_of_renorm_are_recorded_restored_and_preserved() -> None:
    norm = layers.BatchNormalization(renorm=True, momentum=0.9)
    norm.build((None, 4))
    norm(X[:, 0, 0, :1].expand(-1, 4), training=True)
    before, snapshot = state(norm), sn.snapshot(norm)
    with sn.preserved(norm):
        norm(torch.randn(8, 4), training=True)
    assert all(map(torch.equal, state(norm), before))
    norm(torch.randn(8, 4), training=True)
    assert {c.tensor for c in snapshot.diff(norm).changes} >= {"moving_stddev", "renorm_mean"}
    snapshot.restore(norm)
    assert all(map(torch.equal, state(norm), before))
