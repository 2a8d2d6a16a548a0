"""Keras models on the torch backend: seen, checked, and what cannot be done to them is refused."""

from __future__ import annotations

from typing import Any

import keras
import pytest
import torch
from keras import layers
from torch import nn

import stillnorm as sn
from stillnorm.norms import find_norms
from stillnorm.porting.keras.parts import as_torch
from support.keras_nets import BATCHES, images, make, state, trained


def unchanged(model: Any, before: list[torch.Tensor]) -> bool:
    plain = not any("call" in layer.__dict__ for layer in model._flatten_layers())
    return plain and all(map(torch.equal, state(model), before))


# ------------------------------------------------------------------------------- seeing


def test_rows_of_inspect() -> None:
    model = make(momentum=0.9, epsilon=1e-4)
    model.get_layer("block").trainable = False
    rows = {row.path: row for row in sn.inspect(model).layers}
    assert list(rows) == ["bn", "block.bn", "head"]
    bn, frozen = rows["bn"], rows["block.bn"]
    assert (bn.kind, bn.num_features, bn.eps, bn.momentum) == ("BatchNormalization", 4, 1e-4, 0.1)
    assert (bn.normalizes_by_in_train, bn.normalizes_by_in_eval) == ("batch", "running")
    assert (bn.updates_statistics, bn.trains_affine, bn.held) == (True, True, None)
    assert (frozen.normalizes_by_in_train, frozen.updates_statistics) == ("running", False)
    assert (frozen.trains_affine, frozen.held) == (False, "trainable=False")
    assert "train() is a call with training=True" in str(sn.inspect(model))


def test_what_is_used_is_what_the_call_says() -> None:
    model = trained()
    used = [row.used for row in sn.inspect(model, BATCHES[0]).layers]
    assert used == [("running",)] * 3  # though every module's flag says training
    assert model.training


def test_subclassed_models_and_layers_without_center_or_scale() -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [layers.Dense(4), layers.BatchNormalization(center=False, name="a")]
            self.norm = layers.BatchNormalization(scale=False, name="b")

        def call(self, x: Any, training: bool | None = None) -> Any:
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    model = Net()
    assert all(norm.is_lazy for norm in find_norms(model))
    model(torch.randn(3, 5))
    a, b = sorted(find_norms(model), key=lambda norm: norm.path)
    assert (a.path, a.weight is None, a.bias is None) == ("a", False, True)
    assert (b.path, b.weight is None, b.bias is None) == ("b", True, False)


def test_a_keras_model_inside_a_torch_model() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), make(axis=1))
    assert [norm.path for norm in find_norms(net)] == ["0", "1.bn", "1.block.bn", "1.head"]


# ------------------------------------------------------------------------------- checking


@pytest.mark.parametrize("axis", [-1, 1])
def test_a_healthy_model_has_no_findings_and_is_left_as_it_was(axis: int) -> None:
    model = trained(axis)
    before = state(model)
    batches = [x if axis == -1 else x.movedim(-1, 1) for x in BATCHES]
    report = sn.check(
        model, [(x, x) for x in batches], score=lambda y, _: -float(y.square().mean())
    )
    assert not report.findings, report
    assert unchanged(model, before)


@pytest.mark.parametrize("axis", [-1, 1])
def test_statistics_that_are_not_those_of_the_data(axis: int) -> None:
    """They are found, and the fix makes the finding go away."""
    model = trained(axis)
    norm = model.get_layer("bn")
    norm.moving_mean.assign(norm.moving_mean.value + 4)
    batches = [x if axis == -1 else x.movedim(-1, 1) for x in BATCHES]
    before = state(model)
    report = sn.check(model, batches)
    (finding,) = (f for f in report.findings if f.code == "SN105")
    assert finding.paths[0] == "bn"
    assert unchanged(model, before)
    report.fix(unsafe=True)
    assert not sn.check(model, batches).findings


def test_train_mode_is_run_as_fit_runs_it() -> None:
    """The score by batch statistics is that of a call with training=True."""
    model = trained()
    norm = model.get_layer("head")
    norm.moving_mean.assign(norm.moving_mean.value + 4)
    seen: list[float] = []

    def score(y: torch.Tensor, batch: Any) -> float:
        seen.append(float(y.double().sum()))
        return seen[-1]

    sn.check(model, [(BATCHES[0], 0)], score=score)
    with sn.preserved(model), torch.no_grad():
        expected = [float(model(BATCHES[0], training=t).double().sum()) for t in (False, True)]
    assert any(value == pytest.approx(expected[0], rel=1e-4) for value in seen)
    assert any(value == pytest.approx(expected[1], rel=1e-4) for value in seen)
    assert expected[0] != pytest.approx(expected[1], rel=1e-2)


@pytest.mark.parametrize(
    ("code", "break_it"),
    [
        ("SN004", lambda norm: setattr(norm, "trainable", False)),
        ("SN102", lambda norm: norm.moving_mean.assign(norm.moving_mean.value * float("nan"))),
        ("SN103", lambda norm: norm.moving_variance.assign(-norm.moving_variance.value)),
        ("SN108", lambda norm: setattr(norm, "momentum", 0.01)),
    ],
)
def test_rules_on_the_state(code: str, break_it: Any) -> None:
    model = make()
    if code != "SN004":
        model = trained()
    break_it(model.get_layer("head"))
    findings = {finding.code: finding for finding in sn.check(model).findings}
    assert findings[code].paths == ("head",)
    assert findings[code].fix is None  # of what is there for torch's layers


def test_help_on_momentum_is_keras_own() -> None:
    model = trained()
    model.get_layer("head").momentum = 0.01
    (finding,) = sn.check(model).findings
    assert "0.99 is Keras's default" in finding.help


def test_a_layer_called_twice() -> None:
    given, norm = keras.Input((8, 8, 3)), layers.BatchNormalization(name="shared", momentum=0.9)
    x = norm(layers.Conv2D(4, 3)(given))
    x = norm(layers.Conv2D(4, 3, kernel_initializer="ones")(x))
    model = keras.Model(given, layers.GlobalAveragePooling2D()(x))
    with torch.no_grad():
        for x in BATCHES * 20:
            model(x, training=True)
    assert "SN201" in {finding.code for finding in sn.check(model, BATCHES).findings}
    assert "is a layer of Keras" in sn.split_shared(model, BATCHES).refused[0][1]


# ------------------------------------------------------------------------------- state


def test_snapshot_restore_no_updates_and_preserved() -> None:
    model = trained()
    before, snapshot = state(model), sn.snapshot(model)
    model(images(), training=True)
    assert snapshot.diff(model)
    snapshot.restore(model)
    assert not snapshot.diff(model)
    for context in (sn.no_updates, sn.preserved, sn.eval_mode):
        with context(model):
            model(images(), training=context is not sn.eval_mode)
        assert all(map(torch.equal, state(model), before)), context


# ------------------------------------------------------------------------------- the rest


def test_operations_of_torchs_kind_refuse() -> None:
    model = trained()
    before = state(model)
    reason = "is a layer of Keras"
    assert [path for path, why in sn.replace(model, "group").refused if reason in why] == [
        "bn",
        "block.bn",
        "head",
    ]
    assert sn.fold(model, BATCHES[0]).folded == ()
    assert sn.track_statistics(model, BATCHES).tracked == ()
    assert unchanged(model, before)


def test_repairs_of_values_work() -> None:
    model = trained()
    norm = model.get_layer("bn")
    var = as_torch(norm.moving_variance.value)
    norm.moving_variance.assign(var.sqrt())
    report = sn.repair.convert_variance(model, "deviation", "bn")
    torch.testing.assert_close(as_torch(norm.moving_variance.value), var)
    report.undo()
    assert torch.equal(as_torch(norm.moving_variance.value), var.sqrt())


# ------------------------------------------------------------------------------- users' code


def fit(model: Any, batch: Any) -> None:
    model.fit(*batch, verbose=0)


def train_on_batch(model: Any, batch: Any) -> None:
    model.train_on_batch(*batch)


def by_torch(model: Any, batch: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    (model(batch[0], training=True) - batch[1]).square().mean().backward()
    optimizer.step()


PAIRS = [(x, torch.randn(16, 2, generator=torch.Generator().manual_seed(0))) for x in BATCHES]


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("step", [fit, train_on_batch, by_torch])
def test_healthy_inference_and_training_have_no_findings(step: Any, flag: bool) -> None:
    """Whatever torch's flags say; the first step of Keras' runs the model for its shapes too."""
    model = trained()
    model.compile("sgd", "mse")
    model.train(flag)
    model.get_layer("bn").eval()
    before = state(model)
    report = sn.check(model, PAIRS, predict=lambda m, batch: m(batch[0]), train_step=step)
    assert not report.findings, report
    assert unchanged(model, before)


def test_inference_and_training_that_are_not_healthy() -> None:
    def twice(model: Any, batch: Any) -> None:
        model.get_layer("block")(torch.randn(16, 6, 6, 4), training=True)
        train_on_batch(model, batch)

    model = trained()
    model.compile("sgd", "mse")
    report = sn.check(
        model, PAIRS, predict=lambda m, batch: m(batch[0], training=True), train_step=twice
    )
    assert {f.code: f.paths for f in report.findings} == {
        "SN006": ("bn", "block.bn", "head"),
        "SN302": ("block.bn",),
    }


def test_frozen_initial_statistics_are_not_told_by_torchs_flag() -> None:
    model = make()
    model.get_layer("head").eval()
    assert "SN004" not in {finding.code for finding in sn.check(model).findings}


def test_a_norm_that_keras_calls_past_torch_is_not_said_to_be_unreached() -> None:
    given = keras.Input((5, 3))
    wrapped = layers.TimeDistributed(layers.BatchNormalization())
    model = keras.Model(given, layers.Dense(2)(wrapped(given)))
    report = sn.check(model, [torch.randn(64, 5, 3)])
    assert "SN114" not in {finding.code for finding in report.findings}


def test_two_layers_of_one_name_have_two_paths() -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (layers.BatchNormalization(name="bn") for _ in "ab")

        def call(self, x: Any, training: bool | None = None) -> Any:
            return self.b(2 * self.a(x) + 1)

    model = Net()
    model(torch.randn(64, 4), training=True)
    snapshot = sn.snapshot(model)
    assert sn.freeze(model).frozen == ("bn", "bn_1")
    sn.unfreeze(model)
    model(torch.randn(64, 4), training=True)
    snapshot.restore(model)
    assert not snapshot.diff(model)


def test_a_users_class_of_that_name_is_none_of_keras() -> None:
    class BatchNormalization(layers.Layer):
        def call(self, x: Any) -> Any:
            return x

    assert not find_norms(keras.Sequential([layers.Input((4,)), BatchNormalization()]))


# ------------------------------------------------------------------------------- as found


def test_no_updates_and_preserved_keep_all_that_does_not_train() -> None:
    norm = layers.BatchNormalization(renorm=True)
    norm.build((None, 4))
    for context in (sn.no_updates, sn.preserved):
        before = state(norm)
        with context(norm):
            norm(torch.randn(8, 4), training=True)
        assert all(map(torch.equal, state(norm), before)), context


def test_preserved_keeps_trainable() -> None:
    model = trained()
    model.get_layer("block").trainable = False

    def switches() -> list[Any]:
        return [layer.trainable for layer in model._flatten_layers()] + [
            (variable.trainable, variable.value.requires_grad) for variable in model.variables
        ]

    before = switches()
    with sn.preserved(model):
        model.trainable = True
        model.get_layer("bn").trainable = False
    assert switches() == before


def test_what_a_step_of_keras_changes_is_put_back() -> None:
    """The optimizer that the model was compiled with, and its metrics, too."""

    def thaws(model: Any, batch: Any) -> None:
        model.train_on_batch(*batch)
        model.get_layer("bn").trainable = True

    model = trained()
    model.get_layer("bn").trainable = False
    model.compile("adam", "mse", metrics=["mae"])
    model.train_on_batch(*PAIRS[0])
    every = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    before = [(variable.trainable, as_torch(variable.value)) for variable in every]
    sn.check(model, PAIRS, train_step=thaws)
    assert [variable.trainable for variable in every] == [trains for trains, _ in before]
    assert all(
        torch.equal(as_torch(v.value), was) for v, (_, was) in zip(every, before, strict=True)
    )


def test_the_mode_now_is_not_told_of_what_has_none() -> None:
    text = str(sn.inspect(make()))
    assert text.startswith("Functional: 3 norm layers\n")
    both = str(sn.inspect(nn.Sequential(nn.BatchNorm2d(3), make(axis=1)).eval()))
    assert "4 norm layers, eval mode now\n" in both
    assert "of a layer of Keras: train() is a call with training=True" in both
