"""What a batch norm does is ported with it: momentum, eps, what it lacks, whether it is frozen."""

from __future__ import annotations

import json
from typing import Any

import keras
import numpy as np
import pytest
import torch
from torch import nn

import stillnorm as sn
from porting.twins import filled, same, values
from stillnorm.errors import PortError, RefusedError
from stillnorm.norms.adapters.keras import complement
from stillnorm.porting.keras.parts import as_torch


def keras_norm(shape: tuple[int, ...] = (5,), **settings: Any) -> Any:
    return filled(
        keras.Sequential([keras.Input(shape), keras.layers.BatchNormalization(**settings)])
    )


def the_norm(model: Any) -> Any:
    (norm,) = (x for x in model.layers if isinstance(x, keras.layers.BatchNormalization))
    return norm


class FrozenBatchNorm2d(nn.Module):
    """As detectron2 has it."""

    def __init__(self, eps: float = 1e-3) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(5))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.3, 0.9, 0.99, 0.999, 1 / 3, 1.0])
def test_momentum_is_turned_over_and_back_exactly(momentum: float) -> None:
    here, again = nn.BatchNorm1d(5), keras_norm()
    sn.port.from_keras(keras_norm(momentum=momentum), here)
    assert here.momentum == pytest.approx(1 - momentum)
    sn.port.to_keras(here, again)
    assert the_norm(again).momentum == momentum
    assert complement(complement(momentum)) == momentum


def test_numbers_of_numpy() -> None:
    here, x = nn.BatchNorm1d(5), torch.randn(8, 5)
    there = keras_norm(epsilon=np.float32(0.01))
    the_norm(there).momentum = np.float64(0.9)
    assert sn.port.from_keras(there, here, example=x).agreement
    assert here.momentum == 0.1
    here.momentum = np.float32(0.1)  # 1 less it has more digits than fit
    assert sn.port.to_keras(here, there, example=x).agreement


def test_what_was_made_in_inference_mode() -> None:
    with torch.inference_mode():
        here = nn.BatchNorm1d(5)
    there = keras_norm()
    assert sn.port.from_keras(there, here, example=torch.randn(8, 5)).agreement
    before = here.running_mean.clone()
    with pytest.raises(RefusedError, match="was made in inference mode"):
        sn.port.from_keras(filled(keras_norm(center=False), 1), here)
    assert torch.equal(here.running_mean, before)


def test_what_keras_lacks_is_neutral_and_does_not_learn() -> None:
    here = nn.BatchNorm1d(5)
    report = sn.port.from_keras(keras_norm(scale=False), here)
    assert here.weight.tolist() == [1] * 5
    assert (here.weight.requires_grad, here.bias.requires_grad) == (False, True)
    assert "no gamma in Keras" in str(report)
    sn.port.from_keras(keras_norm(center=False), here)
    assert here.bias.tolist() == [0] * 5
    assert (here.weight.requires_grad, here.bias.requires_grad) == (True, False)


def test_what_torch_lacks_is_neutral_and_does_not_learn() -> None:
    there = keras_norm()
    report = sn.port.to_keras(nn.BatchNorm1d(5, affine=False), there)
    norm = the_norm(there)
    assert as_torch(norm.gamma.value).tolist() == [1] * 5
    assert as_torch(norm.beta.value).tolist() == [0] * 5
    assert (norm.gamma.trainable, norm.beta.trainable, norm.trainable) == (False, False, True)
    assert "gamma.trainable is off" in str(report)
    report.undo()
    assert (norm.gamma.trainable, norm.beta.trainable, norm.trainable) == (True, True, True)


def test_a_frozen_weight_alone_is_ported() -> None:
    here, there, again = nn.BatchNorm1d(5), keras_norm(), nn.BatchNorm1d(5)
    here.weight.requires_grad_(False)
    sn.port.to_keras(here, there)
    assert (the_norm(there).gamma.trainable, the_norm(there).beta.trainable) == (False, True)
    sn.port.from_keras(there, again)
    assert (again.weight.requires_grad, again.bias.requires_grad) == (False, True)


def test_what_has_no_place_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"has no weight in torch \(affine=False\), and gamma"):
        sn.port.from_keras(keras_norm(), nn.BatchNorm1d(5, affine=False))
    here = nn.BatchNorm1d(5)
    nn.init.uniform_(here.weight)
    with pytest.raises(RefusedError, match="has no gamma in Keras, and a weight in torch"):
        sn.port.to_keras(here, keras_norm(scale=False))


def test_trainable_false_is_held_and_back() -> None:
    there, here = keras_norm(trainable=False), nn.BatchNorm1d(5)
    report = sn.port.from_keras(there, here, example=torch.randn(8, 5))
    assert sn.is_frozen(here)
    assert not here.weight.requires_grad
    assert "held" in str(report)
    again = keras_norm()
    sn.port.to_keras(here, again, example=torch.randn(8, 5))
    assert not the_norm(again).trainable
    # And what is trainable again is no longer held; its affine learns as before.
    sn.port.from_keras(keras_norm(), here, example=torch.randn(8, 5))
    assert not sn.is_frozen(here)
    assert here.weight.requires_grad
    assert type(here) is nn.BatchNorm1d
    sn.port.to_keras(here, again)
    assert the_norm(again).trainable
    assert the_norm(again).gamma.trainable


needs_torch = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="sn.freeze holds Keras layers on torch alone"
)


@needs_torch
@pytest.mark.parametrize("affine", ["frozen", "trains"])
def test_a_layer_that_is_held_in_keras(affine: Any) -> None:
    there, here, x = keras_norm(), nn.BatchNorm1d(5), torch.randn(8, 5)
    sn.freeze(there, affine=affine)
    report = sn.port.from_keras(there, here, example=x)
    assert sn.is_frozen(here)
    assert here.weight.requires_grad == (affine == "trains")
    assert "held in Keras: held" in str(report)
    report.undo()
    assert not sn.is_frozen(here)
    before = values(there)
    with pytest.raises(RefusedError, match="in Keras, and not in torch: "):
        sn.port.to_keras(here, there)
    assert same(values(there), before)


def test_undo_of_a_hold() -> None:
    here = nn.BatchNorm1d(5)
    before = {k: v.clone() for k, v in here.state_dict().items()}
    report = sn.port.from_keras(keras_norm(trainable=False), here)
    report.undo()
    assert type(here) is nn.BatchNorm1d
    assert (here.eps, here.momentum, here.weight.requires_grad) == (1e-5, 0.1, True)
    assert all(torch.equal(here.state_dict()[k], v) for k, v in before.items())


def test_what_learns_and_has_no_place_is_said() -> None:
    x = torch.randn(8, 5)
    report = sn.port.to_keras(nn.BatchNorm1d(5), keras_norm(scale=False), example=x)
    assert "no gamma in Keras: weight, now 1, does not learn there" in str(report)
    there = keras.Sequential([keras.Input((5,)), keras.layers.BatchNormalization()])
    report = sn.port.from_keras(there, nn.BatchNorm1d(5, affine=False), example=x)
    assert "no bias in torch: beta, now 0, does not learn there" in str(report)


def test_held_with_a_learning_affine_has_no_twin() -> None:
    here = nn.BatchNorm1d(5)
    sn.recalibrate(here, torch.randn(32, 5))
    sn.freeze(here, affine="trains")
    with pytest.raises(RefusedError, match="held while its affine trains"):
        sn.port.to_keras(here, keras_norm())
    # From Keras it becomes frozen as a whole.
    sn.port.from_keras(keras_norm(trainable=False), here)
    assert not here.weight.requires_grad


def test_a_foreign_frozen_layer() -> None:
    there, here = keras_norm((4, 4, 5), trainable=False), FrozenBatchNorm2d()
    x = torch.randn(3, 4, 4, 5)
    assert sn.port.from_keras(there, here, example=x).agreement
    again = keras_norm((4, 4, 5))
    assert sn.port.to_keras(here, again, example=x).agreement
    assert not the_norm(again).trainable
    with pytest.raises(RefusedError, match="FrozenBatchNorm2d is always frozen"):
        sn.port.from_keras(keras_norm((4, 4, 5)), here)


def test_an_eps_that_is_in_the_code_cannot_be_set() -> None:
    here = FrozenBatchNorm2d()
    del here.eps
    with pytest.raises(RefusedError, match=r"its eps in torch is 0.0 and cannot be set"):
        sn.port.from_keras(keras_norm((4, 4, 5), trainable=False), here)


def test_a_cumulative_average_has_no_twin() -> None:
    with pytest.raises(RefusedError, match="averages over all batches"):
        sn.port.to_keras(nn.BatchNorm1d(5, momentum=None), keras_norm())


@pytest.mark.parametrize(
    ("shape", "axis", "norm"),
    [((4, 5), 1, nn.BatchNorm1d(4)), ((4, 5), -1, nn.BatchNorm1d(5)), ((5,), 1, nn.BatchNorm1d(5))],
)
def test_first_or_last_axis(shape: tuple[int, ...], axis: int, norm: nn.Module) -> None:
    assert sn.port.from_keras(keras_norm(shape, axis=axis), norm, example=torch.randn(6, *shape))


def test_another_axis_is_refused() -> None:
    with pytest.raises(RefusedError, match=r"axis=2 of 4 in Keras is no channel axis"):
        sn.port.from_keras(keras_norm((4, 5, 6), axis=2), nn.BatchNorm2d(5))


def test_renorm_is_refused() -> None:
    with pytest.raises(RefusedError, match="renorm=True in Keras"):
        sn.port.from_keras(keras_norm(renorm=True), nn.BatchNorm1d(5))


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm1d(5), nn.LazyBatchNorm1d(), nn.LayerNorm(5), nn.GroupNorm(1, 5)]
)
def test_other_norms_are_no_twins(norm: nn.Module) -> None:
    with pytest.raises(PortError, match="has 1 batch norm, the torch model 0"):
        sn.port.from_keras(keras_norm(), norm)


def test_without_statistics() -> None:
    with pytest.raises(RefusedError, match="has no running statistics of the batch"):
        sn.port.from_keras(keras_norm(), nn.BatchNorm1d(5, track_running_stats=False))


def test_sync_batch_norm_is_said() -> None:
    report = sn.port.to_keras(nn.SyncBatchNorm(5), keras_norm())
    assert "synchronized=True, on TensorFlow alone" in str(report)


def test_a_compiled_model_has_to_be_compiled_again() -> None:
    there = keras_norm()
    there.compile(loss="mse")
    assert "compile() again" in str(sn.port.to_keras(nn.BatchNorm1d(5), there))
    assert "compile() again" not in str(sn.port.to_keras(nn.BatchNorm1d(5), keras_norm()))


def test_a_refused_layer_is_left_as_it_was_and_the_others_are_ported() -> None:
    there = filled(
        keras.Sequential(
            [
                keras.Input((5,)),
                keras.layers.BatchNormalization(),
                keras.layers.BatchNormalization(momentum=0.9),
            ]
        )
    )
    here = nn.Sequential(nn.BatchNorm1d(5, affine=False), nn.BatchNorm1d(5))
    report = sn.port.from_keras(there, here, strict=False)
    assert [path for path, _ in report.refused] == ["0"]
    assert [one.path for one in report.ported] == ["1"]
    assert (here[0].eps, here[0].momentum, here[1].momentum) == (1e-5, 0.1, 0.1)
    assert here[0].running_mean.tolist() == [0] * 5
    assert here[1].eps == 1e-3


# ------------------------------------------------------------------------------- in no file


def norms(*settings: dict[str, Any]) -> Any:
    parts = [keras.layers.BatchNormalization(**one) for one in settings]
    return filled(keras.Sequential([keras.Input((5,)), *parts]))


def test_what_no_file_of_tensors_has_is_said_with_what_to_write() -> None:
    here = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5))
    report = sn.port.from_keras(norms({}, {}), here)
    assert report.unwritten() == [
        "set on 2 norms, and in no file of tensors: eps 1e-05 -> 0.001, momentum 0.1 -> 0.01",
        "write it where the torch model is made: BatchNorm1d(..., eps=0.001, momentum=0.01)",
    ]
    assert all(line in str(report) for line in report.unwritten())
    setting = json.loads(report.to_json())["ported"][0]["settings"][0]
    assert setting == {"name": "eps", "before": 1e-5, "after": 1e-3}
    # The model of that code, with the file, is the model that was ported.
    again = nn.Sequential(*(nn.BatchNorm1d(5, eps=0.001, momentum=0.01) for _ in range(2)))
    again.load_state_dict(here.state_dict())
    x = torch.randn(8, 5)
    assert torch.equal(again.eval()(x), here.eval()(x))
    report = sn.port.from_keras(norms({}, {}), again)
    assert report.unwritten() == []
    assert "no file" not in str(report)


def test_norms_that_are_set_apart_are_told_apart() -> None:
    here = nn.Sequential(*(nn.BatchNorm1d(5) for _ in range(3)))
    there = norms({"trainable": False}, {"scale": False}, {"epsilon": 1e-5, "momentum": 0.9})
    changed, code = sn.port.from_keras(there, here).unwritten()
    assert "set on 2 norms" in changed
    assert "held False -> True (0)" in changed
    assert "weight.requires_grad True -> False (1)" in changed
    assert "BatchNorm1d(..., eps=0.001, momentum=0.01) (0, 1)" in code
    assert "sn.freeze(model, layers) (0)" in code
    assert "weight.requires_grad_(False) (1)" in code
    assert sn.port.to_keras(here, norms({}, {}, {})).unwritten() == []


@pytest.mark.filterwarnings("ignore::stillnorm.StillnormWarning")
def test_the_code_to_write_is_whole_and_exact() -> None:
    """All of it however many kinds, numbers to the last bit, the class that a held layer was."""
    settings = [{"epsilon": 1 / k, "momentum": 0.5} for k in (3, 7, 9, 11, 13)]
    here = nn.Sequential(*(nn.BatchNorm1d(5) for _ in settings))
    sn.freeze(here, ["0"])
    _, code = sn.port.from_keras(norms(*settings), here).unwritten()
    for path, one in enumerate(settings):
        assert f"BatchNorm1d(..., eps={one['epsilon']!r}, momentum=0.5) ({path})" in code
    assert "sn.unfreeze(model, layers) (0)" in code
    assert "Held" not in code
