"""A checkpoint as a target: the norms in it are found, the rules on state run, nothing is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import stillnorm as sn
from diagnosis.nets import conv_net, estimated, found
from stillnorm.cli import targets
from stillnorm.diagnosis.codes import CODES
from stillnorm.diagnosis.files.checkpoint import SUFFIXES, opened, read_target
from stillnorm.errors import BatchError, FileFormatError
from stillnorm.norms import find_norms
from support import zoo
from support.fingerprint import bits


def poisoned() -> nn.Module:
    net = estimated(conv_net())
    net[4].running_var[2] = torch.nan
    return net


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.ckpt", "a.bin", "a.safetensors", "A.PT"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_kind_of_file_gives_the_same_findings(tmp_path: Path, name: str, prefix: str) -> None:
    state = {f"{prefix}{k}": t for k, t in poisoned().state_dict().items()}
    path = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(state, path)
    else:
        torch.save({"state_dict": state, "epoch": 3}, path)
    for report in (sn.check(path), sn.check(str(path)), sn.check(state)):
        assert found(report) == {"SN102": ("4",)}
        assert report.findings[0].evidence["first_channel"] == 2
        assert report.file == "checkpoint"
        assert report.fix(unsafe=True).fixes == ()


def test_the_head_says_what_it_is(tmp_path: Path) -> None:
    state = estimated(conv_net()).state_dict()
    torch.save({"model": state, "ema": state}, tmp_path / "run3.ckpt")
    head = str(sn.check(tmp_path / "run3.ckpt")).splitlines()[0]
    assert head.startswith("run3.ckpt: checkpoint ('model' was read, not 'ema'), 2 norm layers, ")


def test_rules_that_need_a_model_say_so() -> None:
    report = sn.check(conv_net().state_dict(), select="ALL")
    needy = {code for code, r in CODES.items() if not {"state", "checkpoint"}.issuperset(r.needs)}
    assert {m.code for m in report.not_run if m.reason == "needs a model"} == needy
    unknown = {m.code: m.reason for m in report.not_run if m.reason.endswith("not in the file")}
    assert unknown == {
        "SN104": "eps is not in the file",
        "SN111": "eps is not in the file",
        "SN115": "momentum is not in the file",
    }
    assert not report.crashed


def test_no_rule_crashes_on_odd_norms() -> None:
    """One statistic, half precision, integers, no channels."""
    state = {
        "a.running_mean": torch.zeros(3),
        "b.running_var": torch.ones(3).half(),
        "b.weight": torch.ones(3, dtype=torch.int8),
        "c.running_mean": torch.zeros(0),
        "c.running_var": torch.zeros(0),
        "d.running_mean": torch.zeros(2, 2),
        "e.running_mean": torch.zeros(2, dtype=torch.int64),
        "f.running_mean": torch.zeros(2, device="meta"),
        "f.running_var": torch.zeros(2, device="meta"),
        "g.running_mean": torch.zeros(3),
        "g.running_var": torch.ones(3),
        "g.weight": torch.ones(4),
        "g.num_batches_tracked": torch.ones(2),
    }
    report = sn.check(state, select="ALL")
    assert not report.crashed, report.crashed
    assert [layer.path for layer in report.layers] == ["a", "b", "c", "f", "g"]
    assert str(sn.inspect(state))


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/ghostnet_050"])
def test_the_tree_has_the_layers_of_the_model(name: str) -> None:
    model = zoo.CLASSIFIERS[name]()
    _, tree = opened(model.state_dict())
    norms, stored = find_norms(model), find_norms(tree)
    assert [x.path for x in stored] == [x.path for x in norms]
    for norm, twin in zip(norms, stored, strict=True):
        assert {k: bits(t) for k, t in norm.tensors().items()} == {
            k: bits(t) for k, t in twin.tensors().items()
        }
        assert twin.eps != twin.eps  # not a number: it is not known
        assert not twin.module.training


def test_any_name_is_a_path() -> None:
    one = torch.ones(2)
    keys = ["train", "half.0", "module.bn", "a..b", "norm", "norm.inner", "weight"]
    state: dict[str, Tensor] = {f"{key}.running_mean": one for key in keys} | {"head.weight": one}
    layers = find_norms(read_target(state).tree())
    assert {layer.path for layer in layers} == set(keys)


def test_a_state_that_is_one_norm() -> None:
    (row,) = sn.inspect(nn.BatchNorm1d(3).state_dict()).layers
    assert (row.path, row.num_features, row.batches_seen) == ("", 3, 0)


def test_nothing_in_the_state_is_changed() -> None:
    state = poisoned().state_dict()
    before = {key: bits(tensor) for key, tensor in state.items()}
    sn.check(state, select="ALL")
    assert {key: bits(tensor) for key, tensor in state.items()} == before


def test_batches_and_functions_need_a_model(tmp_path: Path) -> None:
    torch.save(conv_net().state_dict(), tmp_path / "a.pt")
    for given in ({"batches": torch.ones(2, 3, 8, 8)}, {"forward": lambda m, x: m(x)}):
        with pytest.raises(BatchError, match=r"a\.pt is no model that could be run: checkpoint"):
            sn.check(tmp_path / "a.pt", **given)
    with pytest.raises(BatchError, match="is no model"):
        sn.inspect(tmp_path / "a.pt", torch.ones(2, 3, 8, 8))


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("")
    with pytest.raises(FileFormatError, match="no file that can be checked"):
        sn.check(tmp_path / "net.py")
    with pytest.raises(FileFormatError, match="No such file"):
        sn.check(tmp_path / "a.pt")


def test_the_command_line_knows_the_same_files() -> None:
    assert targets.FILES == SUFFIXES


class TestInspect:
    def test_what_is_unknown_is_none(self) -> None:
        net = estimated(conv_net())
        seen = sn.inspect(net.state_dict())
        assert (seen.training, seen.file) == (None, "checkpoint")
        for row, real in zip(seen.layers, sn.inspect(net).layers, strict=True):
            known = ("path", "num_features", "has_affine", "batches_seen", "variance", "dtype")
            assert {k: getattr(row, k) for k in known} == {k: getattr(real, k) for k in known}
            unknown = ("kind", "training", "eps", "momentum", "held", "used", "trains_affine")
            assert {getattr(row, k) for k in unknown} == {None}
            assert row.normalizes_by_in_train is row.normalizes_by_in_eval is None

    def test_the_table_has_a_dash_for_it(self) -> None:
        printed = str(sn.inspect(estimated(conv_net()).state_dict()))
        assert printed.startswith("state dict: checkpoint, 2 norm layers\n")
        assert "everywhere: affine yes, seen 2, float32\n" in printed
        assert printed.count("  -        -       ") == 2
        assert "-: the file does not say" in printed

    def test_findings_are_marked(self) -> None:
        seen = sn.inspect(poisoned().state_dict())
        assert [finding.code for finding in seen.findings] == ["SN102"]
        assert '"training": null' in seen.to_json()

    def test_a_state_without_norms(self) -> None:
        printed = str(sn.inspect(nn.Linear(2, 2).state_dict()))
        assert printed.startswith("state dict: checkpoint, no norm layers\n")


class TestHostile:
    """Keys and tensors that no model has and a file can have."""

    @pytest.mark.parametrize(
        ("name", "tensor", "why"),
        [
            ("num_batches_tracked", torch.tensor(torch.nan), "nan"),
            ("num_batches_tracked", torch.tensor(torch.inf), "inf"),
            ("num_batches_tracked", torch.tensor(1j), "complex64"),
            ("running_mean", torch.zeros(3).to_sparse(), "sparse"),
            ("running_mean", torch.zeros(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
            ("running_mean", torch.zeros(1).expand(10**13), "10000000000000 values"),
            ("weight", torch.ones(3, dtype=torch.complex64), "complex64"),
            ("weight", torch.nested.nested_tensor([torch.ones(1)], layout=torch.jagged), "nested"),
        ],
    )
    def test_a_tensor_that_is_no_norms_is_left_out_and_named(
        self, name: str, tensor: Tensor, why: str
    ) -> None:
        state = {f"bn.{key}": t for key, t in nn.BatchNorm2d(3).state_dict().items()}
        state[f"bn.{name}"] = tensor
        report = sn.check(state, select="ALL")
        assert not report.crashed, report.crashed
        assert report.file == f"checkpoint (1 tensor not read: bn.{name} ({why}))"
        (row,) = sn.inspect(state).layers
        assert row.num_features == 3

    @pytest.mark.parametrize("path", [".", "..a", "a.." * 2, "a." * 3000 + "bn"])
    def test_a_path_of_no_tree_is_a_name(self, path: str) -> None:
        state = {f"{path}.{key}": t for key, t in nn.BatchNorm2d(3).state_dict().items()}
        assert [row.path for row in sn.inspect(state).layers] == [path]
        assert not sn.check(state, select="ALL").crashed

    def test_a_norm_beside_an_empty_component(self) -> None:
        state = dict(nn.BatchNorm2d(3).state_dict())
        (row,) = sn.inspect(state | {".running_var": torch.ones(3)}).layers
        assert row.path == ""

    def test_rules_about_values_do_not_run_where_there_are_none(self) -> None:
        state = {key: t.to("meta") for key, t in conv_net().state_dict().items()}
        report = sn.check(state)
        unread = [missed.code for missed in report.not_run if missed.reason.startswith("no values")]
        assert {"SN102", "SN103", "SN112"} <= set(unread)
        assert "SN601" in report.ran  # it reads the keys
