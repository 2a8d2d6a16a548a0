"""ONNX graphs are read: the norms, their tensors, and what they normalise by."""

from __future__ import annotations

import builtins
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import stillnorm as sn
from diagnosis.graphs import STATISTICS, graph, norm, save, tensors
from diagnosis.nets import conv_net, estimated
from stillnorm.diagnosis.files.checkpoint import read_target
from stillnorm.diagnosis.files.skeleton import StoredNorm
from stillnorm.errors import FileFormatError
from stillnorm.norms import find_norms


def uses(path: Path) -> dict[str, Any]:
    return {norm.path: norm.uses for norm in read_target(path).norms}


def only(path: Path) -> StoredNorm:
    (one,) = read_target(path).norms
    return one


def test_tensors_and_settings(tmp_path: Path) -> None:
    one = only(save(tmp_path / "a.onnx", graph([norm("net.bn")], tensors("net.bn"))))
    assert (one.path, one.eps, one.uses) == ("net.bn", 1e-3, "running")
    assert {k: t.tolist() for k, t in one.tensors.items()} == {
        k: [value] * 3 for k, value in STATISTICS.items()
    }


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_the_dtype_stays(tmp_path: Path, dtype: type) -> None:
    one = only(save(tmp_path / "a.onnx", graph([norm("bn")], tensors("bn", dtype))))
    assert one.tensors["running_var"].numpy().dtype == dtype


def test_bfloat16(tmp_path: Path) -> None:
    init = [helper.make_tensor(t.name, TensorProto.BFLOAT16, [3], [1.5] * 3) for t in tensors("bn")]
    one = only(save(tmp_path / "a.onnx", graph([norm("bn")], init)))
    assert one.tensors["running_var"].dtype == torch.bfloat16
    assert one.tensors["running_var"].tolist() == [1.5] * 3


@pytest.mark.parametrize(
    ("opset", "options", "expected"),
    [
        (20, {}, "running"),
        (20, {"training_mode": 0}, "running"),
        (14, {"training_mode": 1, "outputs": 3}, "batch"),
        (20, {"training_mode": 1}, "batch"),
        (13, {}, "running"),
        (13, {"outputs": 5}, "batch"),
        (7, {"outputs": 5}, "batch"),
        (6, {"is_test": 1}, "running"),
        (6, {"is_test": 0}, "batch"),
        (6, {}, "batch"),
    ],
)
def test_training_mode_of_every_opset(
    tmp_path: Path, opset: int, options: dict[str, Any], expected: str
) -> None:
    body = graph([norm("bn", **options)], tensors("bn"))
    assert uses(save(tmp_path / "a.onnx", body, opset)) == {"bn": expected}


def test_branches_loops_and_functions_count(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [norm("inner", y="b", training_mode=1)],
        "branch",
        [],
        [helper.make_tensor_value_info("b", TensorProto.FLOAT, None)],
    )
    choice = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    function = helper.make_function(
        "own",
        "block",
        ["x", *(f"own.{part}" for part in STATISTICS)],
        ["y"],
        [norm("own", training_mode=1)],
        [helper.make_opsetid("", 20)],
    )
    path = save(tmp_path / "a.onnx", graph([choice], tensors("inner")), functions=[function])
    assert uses(path) == {"inner": "batch", "block/own": "batch"}


def mean_of_data() -> list[Any]:
    inputs = ["x", "bn.weight", "bn.bias", "mean", "var"]
    return [
        helper.make_node("ReduceMean", ["x"], ["mean"], keepdims=0),
        helper.make_node("Identity", ["bn.running_var"], ["var"]),
        helper.make_node("BatchNormalization", inputs, ["y"], "/u/0/BatchNormalization"),
    ]


def test_a_mean_computed_from_the_data_is_the_batch_s(tmp_path: Path) -> None:
    one = only(save(tmp_path / "a.onnx", graph(mean_of_data(), tensors("bn"))))
    assert (one.path, one.uses) == ("u.0", "batch")
    assert "running_mean" not in one.tensors


def test_a_mean_computed_from_tensors_is_not(tmp_path: Path) -> None:
    """Converters to half precision put a Cast between; exporters an Identity."""
    cast = helper.make_node("Cast", ["half"], ["bn.running_mean"], to=TensorProto.FLOAT)
    same = helper.make_node("Identity", ["bn.weight"], ["bn.running_var"])
    half = numpy_helper.from_array(np.ones(3, np.float16), "half")
    init = [half, *(t for t in tensors("bn") if "running" not in t.name)]
    one = only(save(tmp_path / "a.onnx", graph([cast, same, norm("bn")], init)))
    assert one.uses == "running"
    assert one.tensors["running_var"].tolist() == [1.5] * 3


def test_parameters_given_as_inputs_are_not_computed(tmp_path: Path) -> None:
    assert uses(save(tmp_path / "a.onnx", graph([norm("bn")], []))) == {"bn": "running"}


def test_weight_standardisation_is_no_norm_layer(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((1, 3, 4), np.float32), "w")
    body = graph([norm("std", x="w", training_mode=1)], [weight, *tensors("std")])
    assert uses(save(tmp_path / "a.onnx", body)) == {}


def test_instance_norm_by_way_of_batch_norm_mixes_nothing(tmp_path: Path) -> None:
    shape = numpy_helper.from_array(np.array([1, -1, 4, 4]), "shape")
    reshape = helper.make_node("Reshape", ["x", "shape"], ["one"])
    body = graph([reshape, norm("in", x="one", training_mode=1)], [shape, *tensors("in")])
    assert uses(save(tmp_path / "a.onnx", body)) == {"in": "sample"}


def test_calls_of_one_layer_are_one(tmp_path: Path) -> None:
    nodes = [norm("bn", y="a"), norm("bn", x="a", training_mode=1)]
    assert uses(save(tmp_path / "a.onnx", graph(nodes, tensors("bn")))) == {"bn": "batch"}


@pytest.mark.parametrize(
    ("scopes", "path"),
    [("['', 'net.bn', 'batch_norm']", "net.bn"), ("broken [", "n"), ("['']", "n")],
)
def test_paths_that_the_exporter_wrote(tmp_path: Path, scopes: str, path: str) -> None:
    node = helper.make_node("BatchNormalization", ["x", "a", "b", "c", "d"], ["y"], "n")
    entry = node.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", scopes
    assert only(save(tmp_path / "a.onnx", graph([node], []))).path == path


def test_tensors_in_a_file_of_their_own(tmp_path: Path) -> None:
    model = helper.make_model(
        graph([norm("bn")], tensors("bn")), opset_imports=[helper.make_opsetid("", 20)]
    )
    onnx.save(
        model, tmp_path / "a.onnx", save_as_external_data=True, location="d", size_threshold=0
    )
    assert only(tmp_path / "a.onnx").tensors["running_var"].tolist() == [2.0] * 3
    (tmp_path / "d").unlink()
    with pytest.raises(FileFormatError, match="cannot be read") as caught:
        read_target(tmp_path / "a.onnx")
    assert "beside the .onnx" in caught.value.help


def test_circles_end(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Identity", ["b"], ["a"]),
        helper.make_node("Identity", ["a"], ["b"]),
        helper.make_node("BatchNormalization", ["a", "a", "a", "a", "a"], ["y"], "n"),
    ]
    assert only(save(tmp_path / "a.onnx", graph(nodes, []))).tensors == {}


@pytest.mark.parametrize("training", [False, True])
def test_what_torch_exports(tmp_path: Path, training: bool) -> None:
    net = estimated(conv_net()).train(training)
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.EVAL
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.ones(2, 3, 8, 8),),
            tmp_path / "a.onnx",
            dynamo=False,
            training=mode,
            do_constant_folding=False,
        )
    stored = read_target(tmp_path / "a.onnx")
    used = "batch" if training else "running"
    assert {n.path: n.uses for n in stored.norms} == {"1": used, "4": used}
    for twin, layer in zip(find_norms(stored.tree()), find_norms(net), strict=True):
        assert torch.equal(twin.weight, layer.weight)
        assert twin.eps == layer.eps
        if not training:  # exporting in training mode moves the statistics
            assert torch.equal(twin.running_var, layer.running_var)


def test_the_rules_on_state_run(tmp_path: Path) -> None:
    bad = [t for t in tensors("bn") if "var" not in t.name]
    bad.append(numpy_helper.from_array(np.array([1, np.nan, 1], np.float32), "bn.running_var"))
    report = sn.check(save(tmp_path / "a.onnx", graph([norm("bn")], bad)))
    assert [(f.code, f.paths) for f in report.findings] == [("SN102", ("bn",))]
    assert str(report).startswith("a.onnx: ONNX graph, 1 norm layer, ")
    assert {"SN104", "SN111"} <= set(report.ran)  # a graph says eps, but no momentum
    assert "SN115" not in report.ran


def test_inspect_shows_what_the_graph_uses(tmp_path: Path) -> None:
    body = graph([norm("bn", training_mode=1)], tensors("bn"))
    (row,) = sn.inspect(save(tmp_path / "a.onnx", body)).layers
    assert (row.used, row.eps, row.normalizes_by_in_eval) == (("batch",), 1e-3, None)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "a.onnx", graph([norm("bn")], tensors("bn")))
    real = builtins.__import__

    def fail(name: str, *args: Any) -> Any:
        if name == "onnx":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(FileFormatError, match="without the package onnx") as caught:
        sn.check(path)
    assert caught.value.help == "pip install onnx"


@given(st.binary(min_size=1, max_size=200))
def test_any_bytes_give_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("junk") / "a.onnx"
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match="not a whole ONNX file"):
        read_target(path)


@pytest.mark.parametrize("part", range(1, 20))
def test_a_file_cut_short_is_refused_or_has_no_wrong_norm(tmp_path: Path, part: int) -> None:
    path = save(tmp_path / "a.onnx", graph([norm("bn")], tensors("bn")))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * part // 20])
    with pytest.raises(FileFormatError, match="not a whole ONNX file"):
        read_target(path)


def test_a_graph_without_norms(tmp_path: Path) -> None:
    body = graph([helper.make_node("Relu", ["x"], ["y"])], [])
    report = sn.check(save(tmp_path / "a.onnx", body))
    assert report.findings == ()
    assert nn.Module is type(read_target(tmp_path / "a.onnx").tree())


def test_tensors_of_another_length_are_no_tensors_of_the_layer(tmp_path: Path) -> None:
    *others, _ = tensors("bn")
    longer = numpy_helper.from_array(np.full(7, np.nan, np.float32), "bn.running_var")
    report = sn.check(save(tmp_path / "a.onnx", graph([norm("bn")], [*others, longer])))
    assert not report.crashed
    (stored,) = read_target(tmp_path / "a.onnx").norms
    assert list(stored.tensors) == ["weight", "bias", "running_mean"]
