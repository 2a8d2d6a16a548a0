"""A snapshot is an exact copy: what it compares, keeps and writes is right to the bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import stillnorm as sn
from stillnorm.errors import FileFormatError, StateError
from stillnorm.state import SwitchChange, TensorChange, diff_states, read_state
from support import layers
from support.fingerprint import Fingerprint, values


class Siamese(nn.Module):
    """One norm under two names, and one that is private."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.BatchNorm1d(3)
        self.b = self.a
        self.c = nn.BatchNorm1d(3)


# ------------------------------------------------------------------------------------------- diff


@pytest.mark.parametrize("name", layers.CASES)
def test_a_snapshot_does_not_differ_from_its_own_model_and_looks_only(name: str) -> None:
    model = nn.Sequential(layers.make(name)).train()
    before = Fingerprint(model)
    snapshot = sn.snapshot(model)
    assert not snapshot.diff(model)
    assert not snapshot.diff(copy.deepcopy(model))
    assert Fingerprint(model).differences(before) == []


@given(st.data(), st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
def test_a_flipped_bit_in_any_tensor_is_found(data: st.DataObject, dtype: torch.dtype) -> None:
    model = layers.conv_net().to(dtype)
    snapshot = sn.snapshot(model)
    path, layer = data.draw(
        st.sampled_from([(p, m) for p, m in model.named_modules() if hasattr(m, "running_mean")])
    )
    name, tensor = data.draw(st.sampled_from(sorted(layer.state_dict().items())))
    raw = tensor.reshape(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (change,) = snapshot.diff(model).changes
    assert isinstance(change, TensorChange)
    assert (change.path, change.tensor, change.changed) == (path, name, 1)


@pytest.mark.parametrize(
    ("switch", "throw", "before", "after"),
    [
        ("momentum", lambda m: setattr(m[1], "momentum", None), 0.1, None),
        ("eps", lambda m: setattr(m[1], "eps", 0.5), 1e-5, 0.5),
        ("training", lambda m: m[1].train(), False, True),
        (
            "track_running_stats",
            lambda m: setattr(m[1], "track_running_stats", False),
            *(True, False),
        ),
        ("weight.requires_grad", lambda m: m[1].weight.requires_grad_(False), True, False),
        ("bias.requires_grad", lambda m: m[1].bias.requires_grad_(False), True, False),
        ("held", lambda m: sn.freeze(m, "1", affine="trains"), None, "affine trains"),
        (
            "kind",
            lambda m: m.__setitem__(1, nn.SyncBatchNorm.convert_sync_batchnorm(m[1])),
            *("BatchNorm2d", "SyncBatchNorm"),
        ),
    ],
)
def test_every_switch_is_compared(
    switch: str, throw: Callable[[Any], object], before: object, after: object
) -> None:
    model = layers.conv_net().eval()
    snapshot = sn.snapshot(model)
    throw(model)
    assert snapshot.diff(model).changes == (SwitchChange("1", switch, before, after),)


def test_switches_thrown_on_many_layers_are_one_line() -> None:
    model = layers.conv_net().eval()
    snapshot = sn.snapshot(model)
    model.train()
    assert len(snapshot.diff(model)) == 3
    assert "1 and 2 more  training  False   True" in str(snapshot.diff(model))


def test_layers_gone_and_new() -> None:
    model = layers.conv_net()
    snapshot = sn.snapshot(model)
    model[3] = nn.Identity()
    model.append(nn.BatchNorm1d(5))
    difference = snapshot.diff(model)
    assert (difference.gone, difference.new) == (("3.1",), ("7",))


def test_a_layer_registered_twice_is_one_layer_with_both_paths() -> None:
    model = Siamese()
    snapshot = sn.snapshot(model)
    assert [layer.paths for layer in snapshot.layers] == [("a", "b"), ("c",)]
    assert snapshot.diff(model).layers == 2
    model.b = copy.deepcopy(model.a)
    assert not snapshot.diff(model)
    model.b.weight.data[1] = 5
    assert [(c.path, c.channel) for c in snapshot.diff(model).changes] == [("b", 1)]
    del model.b
    assert snapshot.diff(model).gone == ("b",)


# --------------------------------------------------------------------------------------- wrappers


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": lambda m: torch.compile(m, backend="eager"),
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": DistributedDataParallel,
    "DDP of compile": lambda m: DistributedDataParallel(torch.compile(m, backend="eager")),
    "compile of DDP": lambda m: torch.compile(DistributedDataParallel(m), backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "checkpoint inside": lambda m: nn.Sequential(*m[:3], checkpoint_wrapper(m[3]), *m[4:]),
    "FSDP2": lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (1,))),
}


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("process_group")
def test_a_snapshot_of_the_bare_model_fits_the_wrapped_one_and_back(
    wrapper: str, held: bool
) -> None:
    model = layers.conv_net()
    if held:
        sn.freeze(model)
    bare = sn.snapshot(model)
    wrapped = WRAPPERS[wrapper](model)
    assert not bare.diff(wrapped)
    assert not sn.snapshot(wrapped).diff(layers.conv_net() if not held else wrapped)
    if held:
        wrapped.train()
        wrapped(layers.conv_input()).sum().backward()
        bare.verify(wrapped)
        bare.verify(wrapped, "3")


@pytest.mark.usefixtures("process_group")
def test_restore_writes_into_sharded_parameters() -> None:
    model = layers.conv_net()
    bare = sn.snapshot(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with torch.no_grad():
        model[1].weight.add_(1)
    assert [c.tensor for c in bare.diff(model).changes] == ["weight"]
    bare.restore(model)
    assert not bare.diff(model)


# ------------------------------------------------------------------------- what has no value yet


def test_meta_tensors_are_refused_by_name() -> None:
    with pytest.raises(StateError, match=r"0\.weight is on the meta device"):
        sn.snapshot(nn.Sequential(nn.BatchNorm2d(3, device="meta")))


def test_lazy_layers_are_recorded_without_tensors() -> None:
    model = nn.Sequential(nn.LazyBatchNorm1d())
    snapshot = sn.snapshot(model)
    assert not snapshot.diff(model)
    model(torch.randn(4, 3))
    assert [str(c) for c in snapshot.diff(model).changes][:2] == ["weight new", "bias new"]


def test_a_model_without_norms() -> None:
    model = nn.Linear(2, 2)
    snapshot = sn.snapshot(model)
    assert snapshot.layers == ()
    assert not snapshot.diff(model)
    snapshot.verify(model)
    assert not snapshot.restore(model)
    assert repr(snapshot) == "Snapshot(0 norm layers, 0 held)"


def test_buffers_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = layers.conv_net()
    snapshot = sn.snapshot(model)
    with torch.inference_mode():
        model[1].running_mean.add_(1)
    snapshot.restore(model)
    assert not snapshot.diff(model)


# ------------------------------------------------------------------------------------------- file


def odd_model() -> nn.Module:
    """Every kind of layer and hold, odd numbers, odd dtypes, one layer under two names."""
    model = nn.Module()
    model.siamese, model.lazy = Siamese(), nn.LazyBatchNorm2d()
    model.sixteen = nn.BatchNorm2d(3).half()
    model.sixtyfour = nn.BatchNorm2d(2, dtype=torch.float64, eps=0.1 + 0.2)
    model.bare = nn.BatchNorm1d(2, momentum=None, affine=False)
    model.empty = nn.BatchNorm2d(0)
    model.stateless = nn.InstanceNorm2d(3)
    odd = torch.tensor([0x7FC00001, -0x80000000, 0x00000001], dtype=torch.int32)
    model.siamese.c.running_mean.copy_(odd.view(torch.float32))
    sn.freeze(model, ["siamese.a", "sixteen"])
    sn.freeze(model, "sixtyfour", affine="trains")
    model.train()
    return model


@pytest.mark.filterwarnings("ignore::stillnorm.errors.StillnormWarning")
def test_save_and_load_give_the_same_snapshot(tmp_path: Path) -> None:
    model = odd_model()
    snapshot = sn.snapshot(model)
    snapshot.save(tmp_path / "norms.safetensors")
    loaded = sn.Snapshot.load(str(tmp_path / "norms.safetensors"))
    assert not loaded.diff(model)
    assert repr(loaded) == repr(snapshot) == "Snapshot(8 norm layers, 3 held)"
    for ours, theirs in zip(loaded.layers, snapshot.layers, strict=True):
        assert (ours.paths, ours.switches, ours.hold) == (
            *(theirs.paths, theirs.switches, theirs.hold),
        )
        assert [type(v) for v in ours.switches.values()] == [
            type(v) for v in theirs.switches.values()
        ]


@given(st.binary(min_size=16, max_size=16), st.floats(allow_nan=False), st.floats(0, 1))
def test_any_bits_survive_the_file(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, momentum: float, eps: float
) -> None:
    path = tmp_path_factory.mktemp("snapshot") / "a.safetensors"
    model = nn.BatchNorm1d(4, eps=eps, momentum=momentum)
    model.running_var.copy_(torch.frombuffer(bytearray(data), dtype=torch.float32))
    sn.snapshot(model).save(path)
    assert not sn.Snapshot.load(path).diff(model)


def test_the_file_is_a_checkpoint_of_the_norms(tmp_path: Path) -> None:
    model = layers.conv_net()
    sn.snapshot(model).save(tmp_path / "norms.safetensors")
    state = read_state(tmp_path / "norms.safetensors")
    norms = {key for key in model.state_dict() if key.startswith(("1.", "3.1.", "6."))}
    assert state.keys() == norms
    assert not diff_states(state, model.state_dict())


def test_a_loaded_snapshot_restores_and_verifies(tmp_path: Path) -> None:
    model = layers.conv_net()
    sn.freeze(model)
    before = values(model)
    sn.snapshot(model).save(tmp_path / "norms.safetensors")
    sn.unfreeze(model)
    model.train()(layers.conv_input())
    loaded = sn.Snapshot.load(tmp_path / "norms.safetensors")
    loaded.restore(model)
    loaded.verify(model)
    assert values(model) == before


def test_an_interrupted_save_leaves_the_old_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "norms.safetensors"
    model = layers.conv_net()
    sn.snapshot(model).save(path)
    before = path.read_bytes()
    model.train()(layers.conv_input())
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        sn.snapshot(model).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["norms.safetensors"]


def test_a_checkpoint_is_no_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(layers.conv_net().state_dict(), path)
    with pytest.raises(FileFormatError, match="is no snapshot"):
        sn.Snapshot.load(path)
    torch.save(layers.conv_net().state_dict(), path)
    with pytest.raises(FileFormatError, match="not a whole safetensors file"):
        sn.Snapshot.load(path)
    with pytest.raises(FileFormatError, match="No such file"):
        sn.Snapshot.load(tmp_path / "missing")


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    """Save a snapshot whose JSON has been changed."""
    sn.snapshot(layers.conv_net()).save(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    content = json.loads(metadata["stillnorm.snapshot"])
    changed = change(content)
    metadata["stillnorm.snapshot"] = json.dumps(content if changed is None else changed)
    safetensors.torch.save_file(tensors, path, metadata)


def test_a_newer_version_is_refused_as_such(tmp_path: Path) -> None:
    rewrite(tmp_path / "a", lambda content: content.__setitem__("version", 2))
    with pytest.raises(FileFormatError, match="snapshot of version 2"):
        sn.Snapshot.load(tmp_path / "a")


_HOLD = {"affine": "frozen", "asked": True, "required_grad": {}, "shadowed_module": None}
DAMAGE: dict[str, Callable[[Any], object]] = {
    "list": lambda c: [],
    "number": lambda c: 3,
    "no layers": lambda c: c.pop("layers") and None,
    "layers": lambda c: c.__setitem__("layers", 3),
    "layer": lambda c: c.__setitem__("layers", [3]),
    "no paths": lambda c: c["layers"][0].__setitem__("paths", []),
    "paths": lambda c: c["layers"][0].__setitem__("paths", [3]),
    "tensor missing": lambda c: c["layers"][0].__setitem__("paths", ["other"]),
    "tensor unknown": lambda c: c["layers"][0]["tensors"].append("__class__"),
    "tensors": lambda c: c["layers"][0].__setitem__("tensors", None),
    "switch missing": lambda c: c["layers"][0]["switches"].pop("eps") and None,
    "switch unknown": lambda c: c["layers"][0]["switches"].__setitem__("forward", 1),
    "switch type": lambda c: c["layers"][0]["switches"].__setitem__("eps", "1e-5"),
    "switch bool": lambda c: c["layers"][0]["switches"].__setitem__("training", 1),
    "hold": lambda c: c["layers"][0].__setitem__("hold", 3),
    "hold affine": lambda c: c["layers"][0].__setitem__("hold", {"affine": "other"}),
    "hold extra": lambda c: c["layers"][0].__setitem__(
        "hold",
        {"affine": "frozen", "asked": True, "required_grad": {}, "shadowed_module": None, "x": 1},
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_of_another_form_is_refused(tmp_path: Path, damage: str) -> None:
    rewrite(tmp_path / "a", DAMAGE[damage])
    with pytest.raises(FileFormatError, match="damaged snapshot"):
        sn.Snapshot.load(tmp_path / "a")
    rewrite(tmp_path / "a", lambda content: None)
    sn.Snapshot.load(tmp_path / "a")


def test_only_the_tensors_of_a_norm_layer_are_taken(tmp_path: Path) -> None:
    rewrite(tmp_path / "a", lambda c: c["layers"][0]["tensors"].append("__class__"))
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors["1.__class__"] = torch.ones(4)
    safetensors.torch.save_file(tensors, tmp_path / "a", metadata)
    with pytest.raises(FileFormatError, match="tensors is not what it should be"):
        sn.Snapshot.load(tmp_path / "a")
