"""What counts as the same: rounding and no more, on an example that tells something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import pytest
import torch
from keras import layers
from torch import nn

import stillnorm as sn
from porting.twins import dense_net, dense_twin, filled, same, values
from stillnorm.errors import PortError
from stillnorm.porting import copied
from stillnorm.porting.rounding import allowed, of_dtype
from support.fingerprint import Fingerprint
from support.interruptions import Interruption

EPS = torch.finfo(torch.float32).eps


def net(act: Callable[[], Any], policy: str = "float32", rates: tuple[float, ...] = ()) -> Any:
    """Two blocks, a pool and a head."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    block = [layers.Conv2D(6, 3), layers.BatchNormalization(), act()]
    again = [layers.Conv2D(6, 3), layers.BatchNormalization(), act()]
    drops = [layers.Dropout(rate) for rate in rates]
    head = [layers.MaxPooling2D(), layers.Flatten(), *drops, layers.Dense(5)]
    model = filled(keras.Sequential([layers.Input((8, 8, 3)), *block, *again, *head]))
    keras.config.set_dtype_policy(before)
    return model


def twin(act: nn.Module, *last: nn.Module, rates: tuple[float, ...] = ()) -> nn.Sequential:
    block = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), act]
    again = [nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), act]
    head = [nn.MaxPool2d(2), nn.Flatten(), *map(nn.Dropout, rates), nn.Linear(24, 5)]
    return nn.Sequential(*block, *again, *head, *last)


def gelu() -> Any:
    return layers.Activation("gelu")


def leaky() -> Any:
    return layers.LeakyReLU(0.2)


X = (8, 8, 8, 3)


@pytest.mark.parametrize(
    ("act", "right", "wrong"),
    [
        (gelu, nn.GELU(), nn.GELU("tanh")),
        (leaky, nn.LeakyReLU(0.2), nn.LeakyReLU(0.19)),
        (layers.ReLU, nn.ReLU(), nn.Softplus(beta=1000)),
    ],
)
def test_activations_that_are_nearly_the_same(act: Any, right: Any, wrong: Any) -> None:
    x = torch.randn(X)
    agreed = sn.port.from_keras(net(act), twin(right), example=x).agreement
    assert agreed
    assert agreed.error < 2e-6 * agreed.largest
    assert 1e-8 < agreed.rounding < 1e-6
    assert agreed.tolerance == 64 * EPS
    with pytest.raises(PortError, match="eval outputs differ: ") as error:
        sn.port.from_keras(net(act), twin(wrong), example=x)
    assert "the first norm that differs in the forward is 4, after 1, which agrees" in str(
        error.value
    )
    assert "docs/porting.md" in error.value.help


def test_the_tolerance_is_of_the_rounding() -> None:
    assert allowed(1e-5, EPS, EPS) == pytest.approx(1e-4)
    assert allowed(0.0, EPS, EPS) == 64 * EPS
    assert allowed(1.0, EPS, EPS) == 0.1
    half = torch.finfo(torch.float16).eps
    assert allowed(1e-6, half, EPS) == pytest.approx(4e-6 * half / EPS)
    assert of_dtype(torch.float32, accelerated=True) == half  # TF32 has as many bits
    assert of_dtype(torch.float64, accelerated=True) < EPS


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_has_its_own(policy: str) -> None:
    x = torch.randn(X)
    agreed = sn.port.from_keras(net(gelu, policy), twin(nn.GELU()), example=x).agreement
    assert agreed
    assert 64 * EPS < agreed.error / agreed.largest < agreed.tolerance <= 0.1
    with pytest.raises(PortError, match="eval outputs differ"):
        sn.port.from_keras(net(gelu, policy), twin(nn.LeakyReLU(0.3)), example=x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_a_torch_model_in_another_dtype(dtype: torch.dtype) -> None:
    agreed = sn.port.from_keras(net(gelu), twin(nn.GELU()).to(dtype), example=torch.randn(X))
    assert agreed.agreement
    assert agreed.agreement.rounding > 1e-8


def test_a_model_that_does_not_run_in_float64() -> None:
    class Single(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.dtype != torch.float32:
                raise TypeError("float32 only")
            return x

    here = twin(nn.GELU("tanh"), Single())
    agreed = sn.port.from_keras(net(gelu), here, example=torch.randn(X)).agreement
    assert (agreed.tolerance, agreed.rounding) == (1e-3, None)
    assert (
        "allowed are 0.1 %, for a copy of the torch model does not run in float64" in agreed.told()
    )


def test_a_tolerance_that_is_given_stays() -> None:
    x = torch.randn(X)
    here = twin(nn.GELU("tanh"))
    agreed = sn.port.from_keras(net(gelu), here, example=x, tolerance=1e-3).agreement
    assert (agreed.tolerance, agreed.rounding) == (1e-3, None)
    assert "allowed are 0.1 %, as given" in agreed.told()


def test_the_copy_leaves_the_model_as_it_was() -> None:
    there, here, x = net(leaky), twin(nn.LeakyReLU(0.2)), torch.randn(X)
    sn.port.from_keras(there, here)
    sn.freeze(here, ["1"])
    before, kept = Fingerprint(here, versions=False), values(there)
    assert "frozen is True in torch" in str(sn.port.compare(there, here, x))
    assert before.differences(Fingerprint(here, versions=False)) == []
    assert same(values(there), kept)


def test_ctrl_c_in_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    there, here, x = net(leaky), twin(nn.LeakyReLU(0.2)), torch.randn(X)
    before, kept = Fingerprint(here, versions=False), values(there)
    Interruption(monkeypatch, copied.copy, "deepcopy", 1, KeyboardInterrupt, before=True)
    with pytest.raises(KeyboardInterrupt):
        sn.port.from_keras(there, here, example=x)
    monkeypatch.undo()
    assert before.differences(Fingerprint(here, versions=False)) == []
    assert same(values(there), kept)


# ------------------------------------------------------------------------------- several outputs


class Several(nn.Module):
    def __init__(self, returns: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.body, self.returns, self.seen = dense_twin(), returns, list[torch.Tensor]()

    def forward(self, x: torch.Tensor) -> Any:
        self.seen.append(x)
        return self.returns(self.body(x))


def several(returns: Callable[[Any], Any]) -> Any:
    x, body = keras.Input((6,)), dense_net()
    return keras.Model(x, returns(body(x)))


@pytest.mark.parametrize(
    ("there", "right", "wrong", "worst"),
    [
        (
            lambda y: [1e4 * y, keras.ops.softmax(y)],
            lambda y: [1e4 * y, y.softmax(1)],
            lambda y: [1e4 * y, 0.99 * y.softmax(1)],
            "output 1 is the worst, ",
        ),
        (
            lambda y: [y, keras.ops.argmax(y, axis=1), y > 0],
            lambda y: [y, y.argmax(1), y > 0],
            lambda y: [y, y.argmax(1), y <= 0],
            "output 2 is the worst, ",
        ),
        (lambda y: y > 0, lambda y: y > 0, lambda y: y <= 0, ""),
        (keras.ops.sum, torch.sum, lambda y: 1.001 * y.sum(), ""),
        (
            lambda y: keras.ops.where(y > 0, y, float("-inf")),
            lambda y: torch.where(y > 0, y, float("-inf")),
            lambda y: torch.where(y > y[y > 0].min(), y, float("-inf")),
            "",
        ),
        (
            lambda y: [y, keras.ops.mean(y - keras.ops.mean(y))],
            lambda y: [y, (y - y.mean()).mean()],  # rounding alone
            lambda y: [y, y.mean()],
            "output 1 is the worst, ",
        ),
    ],
)
def test_each_output_has_its_own_scale(there: Any, right: Any, wrong: Any, worst: str) -> None:
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    agreed = sn.port.from_keras(several(there), Several(right), example=x).agreement
    assert agreed
    assert agreed.tolerance == 64 * EPS
    with pytest.raises(PortError, match=f"eval outputs differ: {worst}off by"):
        sn.port.from_keras(several(there), Several(wrong), example=x)


def test_one_number_may_happen_to_be_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one number ten times its own rounding is too little: the next may round much worse."""
    given: list[float] = []

    def noted(own: float, *rest: float) -> float:
        given.append(own)
        return allowed(own, *rest)

    monkeypatch.setattr("stillnorm.porting.agreement.allowed", noted)
    there, here = several(lambda y: y), Several(lambda y: y)
    for rows in (1, 2):
        agreed = sn.port.from_keras(there, here, example=torch.randn(rows, 6)).agreement
        assert given[0] == pytest.approx(agreed.rounding * max(1, 8 / (rows * 3)))
        given.clear()


def test_what_the_forward_notes_is_gone() -> None:
    here = Several(lambda y: y)
    assert sn.port.from_keras(several(lambda y: y), here, example=torch.randn(9, 6)).agreement
    assert here.seen == []


def test_a_copy_that_is_the_model() -> None:
    class Itself(nn.Linear):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

    here = twin(nn.GELU())
    here[8] = Itself(24, 5)
    agreed = sn.port.from_keras(net(gelu), here, example=torch.randn(X)).agreement
    assert (agreed.rounding, agreed.not_compared) == (None, "")
    assert here[8].weight.dtype == torch.float32


# ------------------------------------------------------------------------------- examples


def test_what_is_not_finite_proves_nothing() -> None:
    x = torch.randn(9, 6)
    nan = several(lambda y: y * float("nan"))
    with pytest.raises(PortError, match="the outputs are not finite anywhere"):
        sn.port.from_keras(nan, Several(lambda y: y * float("nan")), example=x)
    x[0, 0] = float("nan")
    with pytest.raises(PortError, match="the example has NaN in it"):
        sn.port.from_keras(several(lambda y: y), Several(lambda y: y), example=x)


def test_an_example_of_zeros_proves_nothing() -> None:
    for x in (torch.zeros(X), torch.zeros(X).numpy()):
        with pytest.raises(PortError, match="the example is 0 everywhere") as error:
            sn.port.from_keras(net(gelu), twin(nn.ReLU()), example=x)
        assert "torch.randn" in error.value.help


def one_number(bias: float, units: int, activation: str | None = "relu") -> Any:
    there = keras.Sequential([keras.Input((4,)), layers.Dense(units, activation=activation)])
    there.layers[0].bias.assign([bias] * units)
    return there


@pytest.mark.parametrize(
    ("there", "last"),
    [
        (one_number(-100, 3), nn.ReLU()),
        (one_number(-100, 1), nn.ReLU()),
        (one_number(0, 1, "softmax"), nn.Softmax(1)),
        (one_number(100, 3, "sigmoid"), nn.Sigmoid()),
    ],
)
def test_outputs_that_are_one_number_prove_nothing(there: Any, last: nn.Module) -> None:
    units = there.output_shape[-1]
    here = nn.Sequential(nn.Linear(4, units), last)
    with pytest.raises(PortError, match="everywhere on the example, which proves nothing"):
        sn.port.from_keras(there, here, example=torch.randn(6, 4))


@pytest.mark.parametrize("x", [torch.randn(1, 4), torch.ones(1, 4), torch.ones(5, 4)])
def test_one_output_of_one_sample_is_a_number_like_any(x: torch.Tensor) -> None:
    here = nn.Sequential(nn.Linear(4, 1))
    assert sn.port.from_keras(filled(one_number(0, 1, None)), here, example=x).agreement


def test_the_same_samples_and_several_outputs() -> None:
    assert sn.port.from_keras(dense_net(), dense_twin(), example=torch.ones(5, 6)).agreement


# ------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ((0.3,), (0.5,), "drops 0.5 in torch, 0.3 in Keras"),
        ((0.3, 0.1), (0.3, 0.2), "drops 0.2 in torch, 0.1 in Keras"),
        ((0.3, 0.1), (0.1, 0.3), ""),  # branches come in any order
        ((0.3,), (0.3, 0.0), ""),
        ((0.3,), (), ""),
    ],
)
def test_rates_of_dropout(there: Any, here: Any, said: str) -> None:
    model, x = twin(nn.ReLU(), rates=here), torch.randn(X)
    if not said:
        assert sn.port.from_keras(net(layers.ReLU, rates=there), model, example=x).agreement
        return
    with pytest.raises(PortError, match=f"nothing was changed: [0-9]*: {said}") as error:
        sn.port.from_keras(net(layers.ReLU, rates=there), model, example=x)
    assert "set it alike in both models" in error.value.help
    assert not any(module._forward_hooks for module in model.modules())


# ------------------------------------------------------------------------------- where


def test_a_difference_behind_the_last_norm() -> None:
    with pytest.raises(PortError, match="the difference lies after the last, 4"):
        sn.port.from_keras(net(gelu), twin(nn.GELU(), nn.Softmax(1)), example=torch.randn(X))


def test_weights_that_differ_are_named() -> None:
    there, here, x = net(gelu), twin(nn.GELU()), torch.randn(X)
    sn.port.from_keras(there, here)
    with torch.no_grad():
        here[8].bias += 1
    agreed = sn.port.compare(there, here, x)
    assert agreed.unequal == ("8",)
    assert agreed.place == ""
    assert "weights differ: 8" in str(agreed)


def test_statistics_come_in_the_order_of_the_forward() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b, self.a = nn.BatchNorm1d(4), nn.BatchNorm1d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).relu())

    parts = [
        layers.BatchNormalization(name="a"),
        layers.ReLU(),
        layers.BatchNormalization(name="b"),
    ]
    there = filled(keras.Sequential([keras.Input((4,)), *parts]))
    report = sn.port.from_keras(there, Backwards(), example=torch.randn(9, 4))
    assert [one.path for one in report.agreement.statistics] == ["a", "b"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"which": "norms"}, r"3 torch layers with weights not ported \(which='norms'\)"),
        ({"names": {"a": "0"}}, r"4 torch layers with weights not ported \(names=\)"),
    ],
)
def test_an_example_before_all_is_ported(arguments: Any, said: str) -> None:
    there = net(layers.ReLU)
    there.layers[0].name = "a"
    with pytest.raises(PortError, match=said):
        sn.port.from_keras(there, twin(nn.ReLU()), example=torch.randn(X), **arguments)
