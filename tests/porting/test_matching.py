"""Which layer is which; and what is refused, with the reason, before anything changes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from torch import nn

import stillnorm as sn
from porting.twins import NestedTwin, dense_net, dense_twin, filled, nested_net, same, values
from stillnorm.errors import PortError, RefusedError, StateError
from stillnorm.porting.keras.parts import read
from support.fingerprint import Fingerprint


def two_dense() -> Any:
    return filled(
        keras.Sequential([keras.Input((4,)), layers.Dense(4, name="a"), layers.Dense(4, name="b")])
    )


class TwoLinear(nn.Module):
    """Registered in the other order than called."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def test_by_name() -> None:
    report = sn.port.from_keras(nested_net(), NestedTwin())
    assert report.matched == "names"
    assert {(one.name, one.path) for one in report.ported} == {
        ("conv", "conv"),
        ("norm", "norm"),
        ("block/conv", "block.conv"),
        ("block/norm", "block.norm"),
    }


def test_by_order_says_that_layers_may_have_changed_places() -> None:
    report = sn.port.from_keras(two_dense(), TwoLinear())
    assert report.matched == "order"
    assert "layers of one shape may have changed places" in str(report)


def test_an_order_that_is_wrong_is_found_on_an_example_and_taken_back() -> None:
    there, here, x = two_dense(), TwoLinear(), torch.randn(8, 4)
    before = Fingerprint(here, versions=False)
    with pytest.raises(PortError, match="the models differ, and nothing was changed") as error:
        sn.port.from_keras(there, here, example=x)
    assert "changed places: give names=" in error.value.help
    assert before == Fingerprint(here, versions=False)
    report = sn.port.from_keras(there, here, names={"a": "first", "b": "second"}, example=x)
    assert report.agreement
    assert report.matched == "map"


def test_a_function_of_names() -> None:
    names = {"a": "first", "b": "second"}.__getitem__
    assert sn.port.compare(two_dense(), TwoLinear(), torch.randn(8, 4), names=names).error > 0
    assert sn.port.from_keras(two_dense(), TwoLinear(), names=names).matched == "map"


def test_a_map_ports_what_it_names() -> None:
    there, here = two_dense(), TwoLinear()
    kept = here.second.weight.clone()
    report = sn.port.from_keras(there, here, names={"a": "first"})
    assert (report.left_in_keras, report.left_in_torch) == (("b",), ("second",))
    assert "in Keras, not in names=, left alone: b\n" in str(report)
    assert torch.equal(here.second.weight, kept)
    assert not torch.equal(here.first.weight, kept)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"aa": "first"}, r"'aa' is no layer of the Keras model.*\n.*nearest: a"),
        ({"a": "frist"}, r"'frist' is no layer of the torch model.*\n.*nearest: first"),
        ({"a": "first", "b": "first"}, "gives 'first' to several layers"),
    ],
)
def test_a_map_with_a_mistake(names: dict[str, str], message: str) -> None:
    with pytest.raises(PortError, match=message):
        sn.port.from_keras(two_dense(), TwoLinear(), names=names)


def test_another_number_of_layers() -> None:
    here = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(PortError, match="has 2 dense layers, the torch model 1"):
        sn.port.from_keras(two_dense(), here)


def test_another_shape() -> None:
    here = dense_twin()
    here[4] = nn.Linear(10, 4, bias=False)
    with pytest.raises(PortError, match=r"dense layer 10 -> 3, no bias in Keras and 4, .* 10 -> 4"):
        sn.port.from_keras(dense_net(), here)


def test_layers_of_other_kinds_are_refused_by_name() -> None:
    there = filled(
        keras.Sequential(
            [
                keras.Input((6,), dtype="int32"),
                layers.Embedding(10, 4, name="words"),
                layers.LayerNormalization(name="norm"),
                layers.Dense(3, name="head"),
            ]
        )
    )
    here = nn.Sequential(nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    before = Fingerprint(here, versions=False)
    with pytest.raises(RefusedError, match=r"words .* Embedding .*\(and 3 more\)") as error:
        sn.port.from_keras(there, here)
    assert before == Fingerprint(here, versions=False)
    assert "strict=False" in error.value.help
    report = sn.port.from_keras(there, here, strict=False)
    assert [path for path, _ in report.refused] == ["words", "norm", "0", "1"]
    assert [one.name for one in report.ported] == ["head"]
    assert "a LayerNormalization in Keras: its gamma, beta cannot be ported" in str(report)


def test_quantised_and_lora_kernels_are_refused() -> None:
    there = two_dense()
    there.get_layer("a").enable_lora(2)
    with pytest.raises(PortError, match="has 1 dense layer, the"):
        sn.port.from_keras(there, TwoLinear())
    with pytest.raises(PortError, match="'a' is no layer of the Keras model"):
        sn.port.from_keras(there, TwoLinear(), names={"a": "first"})


def test_a_parametrized_layer_is_no_twin() -> None:
    here = TwoLinear()
    nn.utils.parametrizations.weight_norm(here.first)
    with pytest.raises(PortError, match="the torch model 1"):
        sn.port.from_keras(two_dense(), here)


def test_tied_weights_that_are_not_tied_in_keras() -> None:
    here = TwoLinear()
    here.first.weight = here.second.weight
    before = Fingerprint(here, versions=False)
    with pytest.raises(StateError, match="second and first share their weight in torch"):
        sn.port.from_keras(two_dense(), here)
    assert before == Fingerprint(here, versions=False)
    there = two_dense()
    there.get_layer("b").kernel.assign(there.get_layer("a").kernel)
    sn.port.from_keras(there, here)


def test_what_is_no_model() -> None:
    with pytest.raises(PortError, match="a Sequential is no model of Keras 3"):
        sn.port.from_keras(dense_twin(), dense_twin())
    with pytest.raises(PortError, match="a Sequential is no model of torch's own"):
        sn.port.from_keras(dense_net(), dense_net())
    with pytest.raises(PortError, match="is not built"):
        sn.port.from_keras(keras.Sequential([layers.Dense(4)]), nn.Linear(4, 4))
    with pytest.raises(ValueError, match="which='some'"):
        sn.port.from_keras(dense_net(), dense_twin(), which="some")  # type: ignore[arg-type]


def test_names_that_are_no_map() -> None:
    for names in (["a"], "a"):
        with pytest.raises(PortError, match="no map and no function"):
            sn.port.from_keras(two_dense(), TwoLinear(), names=names)  # type: ignore[arg-type]
    with pytest.raises(PortError, match=r"\['first'\] is no layer of the torch model"):
        sn.port.from_keras(two_dense(), TwoLinear(), names={"a": ["first"]})  # type: ignore[dict-item]


class Own(keras.Model):
    """Two layers of one name, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = layers.Dense(4, name="x"), layers.Dense(4, name="x")
        self.spare = layers.Dense(4, name="spare")

    def call(self, x: Any) -> Any:
        return self.two(self.one(x))


def test_layers_of_one_name_cannot_be_mapped() -> None:
    there = Own()
    there(keras.ops.zeros((1, 4)))
    with pytest.raises(PortError, match="several layers of the Keras model are called 'x'"):
        sn.port.from_keras(there, nn.Sequential(nn.Linear(4, 4)), names={"x": "0"})


def test_a_layer_that_is_never_called_is_refused_by_name() -> None:
    there, here = Own(), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    there(keras.ops.zeros((1, 4)))
    with pytest.raises(RefusedError, match="spare cannot be ported: a Dense in Keras that has not"):
        sn.port.from_keras(there, here)
    x = torch.randn(3, 4)
    report = sn.port.from_keras(there, here, strict=False, example=x)
    assert report.agreement
    assert [name for name, _ in report.refused] == ["spare"]
    here.append(nn.Linear(4, 4))
    with pytest.raises(PortError, match="left out is spare: a Dense in Keras that has not been"):
        sn.port.from_keras(there, here)


def test_keras_layers_that_share_a_kernel_and_torch_layers_that_do_not() -> None:
    class Tied(layers.Dense):
        def build(self, shape: Any) -> None:
            self._kernel, self.bias, self.built = there.layers[0].kernel, None, True

    there = keras.Sequential([keras.Input((4,)), layers.Dense(4, use_bias=False, name="a")])
    there.add(Tied(4, name="b"))
    here = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    before = values(there)
    with pytest.raises(StateError, match="a and b share their weight in Keras, not in torch"):
        sn.port.to_keras(here, there)
    assert same(values(there), before)
    here[1].weight = here[0].weight
    assert sn.port.to_keras(here, there, example=torch.randn(3, 4)).agreement


def test_buffers_that_overlap() -> None:
    there = filled(
        keras.Sequential([keras.Input((5,)), *(layers.BatchNormalization() for _ in range(2))])
    )
    here, whole = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5)), torch.ones(7)
    here[0]._buffers["running_var"], here[1]._buffers["running_var"] = whole[:5], whole[2:]
    with pytest.raises(StateError, match="0 and 1 share their running_var in torch"):
        sn.port.from_keras(there, here)
    assert whole.tolist() == [1] * 7
    # The same statistics in both are converted once.
    here[1]._buffers["running_var"] = here[0].running_var
    there.layers[1].moving_variance.assign(there.layers[0].moving_variance)
    sn.port.from_keras(there, here, count=2)
    expected = 2 * read(there.layers[0].moving_variance)
    torch.testing.assert_close(here[0].running_var, expected)


def test_what_is_no_keras_model() -> None:
    for what in (keras.Input((5,)), keras.optimizers.SGD()):
        with pytest.raises(PortError, match="is no Keras model"):
            sn.port.from_keras(what, nn.Linear(5, 5))


@pytest.mark.parametrize("count", [2.5, "32", [32], {"2": 2.5}])
def test_counts_that_are_no_whole_numbers(count: Any) -> None:
    with pytest.raises(PortError, match="is no whole number of values"):
        sn.port.from_keras(dense_net(), dense_twin(), count=count)


def test_counts_that_are_whole_numbers() -> None:
    there = dense_net()
    for n in (np.int64(2), torch.tensor(2), {"2": np.int32(2)}):
        here = dense_twin()
        report = sn.port.from_keras(there, here, count=n)
        expected = 2 * read(there.layers[1].moving_variance)
        torch.testing.assert_close(here[2].running_var, expected)
        assert "of 1 norm whose count" in report.variance


def test_counts_that_cannot_be() -> None:
    with pytest.raises(PortError, match="count=1: of less than 2 values"):
        sn.port.from_keras(dense_net(), dense_twin(), count=1)
    with pytest.raises(PortError, match="'0' is no batch norm"):
        sn.port.from_keras(dense_net(), dense_twin(), count={"0": 8})


def test_a_subclassed_model() -> None:
    """Without a graph the layers are those that the model keeps, in the order they were made."""

    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [layers.Dense(4), layers.BatchNormalization()]
            self.head = layers.Dense(2)

        def call(self, x: Any, training: bool | None = None) -> Any:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    there = Net()
    x = torch.randn(8, 3)
    there(keras.ops.convert_to_tensor(x.numpy()))
    here = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert sn.port.from_keras(filled(there), here, example=x).agreement


def test_a_layer_in_two_places_is_one_layer() -> None:
    shared, given = layers.Dense(4, name="shared"), keras.Input((4,))
    there = filled(keras.Model(given, shared(shared(given))))
    here = nn.Linear(4, 4)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = here

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.shared(self.shared(x))

    assert sn.port.from_keras(there, Twice(), example=torch.randn(3, 4)).agreement


# ------------------------------------------------------------------------------- what is said


def test_a_surplus_layer_is_named() -> None:
    here = NestedTwin()
    here.extra = nn.BatchNorm2d(4)
    with pytest.raises(PortError, match="has 2 batch norms, the torch model 3") as error:
        sn.port.from_keras(nested_net(), here)
    assert error.value.help.startswith("only in torch: extra; give a map")


def test_names_of_both_sides_are_listed_where_none_is_the_same() -> None:
    there = keras.Sequential(
        [keras.Input((4,)), *(layers.Dense(4, name=f"dense{i}") for i in range(6))]
    )
    with pytest.raises(PortError, match="has 6 dense layers, the torch model 1") as error:
        sn.port.from_keras(there, nn.Sequential(nn.Linear(4, 4)))
    listed = "only in Keras: dense0, dense1, dense2, dense3 and 2 more; only in torch: 0; give"
    assert error.value.help.startswith(listed)


def test_which_layer_went_where_is_told_where_the_order_could_be_wrong() -> None:
    text = str(sn.port.from_keras(two_dense(), TwoLinear()))
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["a", "second", "dense", "layer"],
        ["b", "first", "dense", "layer"],
    ]
    there = keras.Sequential(
        [keras.Input((4,)), *(layers.Dense(4, name=f"d{i}") for i in range(30))]
    )
    here = nn.Sequential(*(nn.Linear(4, 4) for _ in range(30)))
    text = str(sn.port.from_keras(there, here))
    assert "and 10 more: report.ported" in text


def test_distinct_shapes_have_not_changed_places() -> None:
    report = sn.port.from_keras(dense_net(), dense_twin())
    assert report.matched == "order"
    assert not report.by_chance
    assert "changed places" not in str(report)
    here = dense_twin()
    here[1] = nn.Tanh()
    with pytest.raises(PortError) as error:
        sn.port.from_keras(dense_net(), here, example=torch.randn(8, 6))
    assert "changed places" not in error.value.help


def test_an_article() -> None:
    there = keras.Sequential([keras.Input((3,)), layers.Embedding(5, 4, name="words")])
    with pytest.raises(RefusedError, match="words cannot be ported: an Embedding in Keras"):
        sn.port.from_keras(there, nn.Sequential())
    with pytest.raises(RefusedError, match="0 cannot be ported: an Embedding in torch"):
        sn.port.from_keras(two_dense(), nn.Sequential(nn.Embedding(5, 4), TwoLinear()))
