"""Two states compared: every change found, nothing else reported, and told as it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from stillnorm.state import TensorChange, diff_states
from stillnorm.state.diff import Others
from stillnorm.state.keys import clean_keys, norm_prefixes
from support import layers

State = dict[str, Tensor]


def state(seed: int = 1) -> State:
    return {key: t.clone() for key, t in layers.conv_net(seed).state_dict().items()}


def audit_of_averages(state: State) -> list[list[float]]:
    """What thread 000 keeps in `bn_para.pt`, in the thread's own order."""
    return [
        [np.average(state[f"{prefix}.{name}"].numpy()) for name in _AUDITED]
        for prefix in norm_prefixes(state)
    ]


_AUDITED = ("running_mean", "running_var", "weight", "bias")


# ------------------------------------------------------------------------------- what is found


def test_equal_states_do_not_differ() -> None:
    difference = diff_states(state(), state())
    assert not difference
    assert len(difference) == 0
    assert (difference.layers, difference.tensors) == (3, 15)
    assert difference.others == Others(changed=0, unchanged=5, gone=0, new=0)
    assert str(difference).splitlines()[0] == (
        "no difference, bit for bit: 3 norm layers, 15 tensors"
    )


@given(st.data())
def test_a_flipped_bit_in_any_norm_tensor_is_the_one_difference(data: st.DataObject) -> None:
    a, b = state(), state()
    keys = [key for key in b if key.startswith(("1.", "3.1.", "6."))]
    key = data.draw(st.sampled_from(keys))
    raw = b[key].reshape(-1).view(torch.uint8)
    at = data.draw(st.integers(0, raw.numel() - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    (change,) = diff_states(a, b).changes
    assert isinstance(change, TensorChange)
    assert f"{change.path}.{change.tensor}" == key
    assert change.changed == 1
    if a[key].dim():
        assert change.channel == at // a[key].element_size()


def test_the_audit_of_averages_passes_where_channels_have_changed_places() -> None:
    a = state()
    b = state()
    b["1.running_mean"] = a["1.running_mean"][[1, 0, 2, 3]]
    b["6.running_var"] = a["6.running_var"].flip(0)
    assert audit_of_averages(a) == audit_of_averages(b)
    found = {(c.path, c.tensor, c.changed) for c in diff_states(a, b).changes}
    assert found == {("1", "running_mean", 2), ("6", "running_var", 4)}


def test_other_tensors_are_counted_and_make_no_difference() -> None:
    a, b = state(), state()
    b["0.weight"] += 1
    del b["5.bias"]
    b["head.weight"] = torch.ones(3)
    difference = diff_states(a, b)
    assert not difference
    assert difference.others == Others(changed=1, unchanged=3, gone=1, new=1)
    assert str(difference).endswith("other tensors: 1 changed, 3 unchanged, 1 gone, 1 new")


def test_layers_gone_and_new_are_named() -> None:
    a, b = state(), state()
    b = {key.replace("6.", "norm."): tensor for key, tensor in b.items()}
    difference = diff_states(a, b)
    assert (difference.gone, difference.new, len(difference)) == (("6",), ("norm",), 2)
    assert str(difference).startswith("2 differences: 0 of 2 norm layers changed, 1 gone, 1 new")
    assert "gone: 6" in str(difference)
    assert "new: norm" in str(difference)


def test_a_checkpoint_without_buffers_has_lost_them() -> None:
    a, b = state(), state()
    b = {key: t for key, t in b.items() if "running" not in key}
    found = [str(c) for c in diff_states(a, b).changes if c.path == "1"]
    assert found == ["running_mean gone", "running_var gone"]
    assert [str(c) for c in diff_states(b, a).changes if c.path == "1"] == [
        "running_mean new",
        "running_var new",
    ]


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_wrappers_make_no_difference(prefix: str) -> None:
    wrapped = {prefix + key: tensor for key, tensor in state().items()}
    assert not diff_states(state(), wrapped)
    assert not diff_states(wrapped, state())
    assert diff_states(wrapped, state()).others == diff_states(state(), state()).others


def test_a_model_that_is_itself_a_norm_layer() -> None:
    a, b = nn.BatchNorm2d(3).state_dict(), nn.BatchNorm2d(3).state_dict()
    b["weight"] = torch.tensor([1.0, 1.0, 2.0])
    difference = diff_states(a, b)
    assert difference.changes[0].path == ""
    assert "(root)" in str(difference)


def test_quantized_and_sparse_tensors_elsewhere_are_compared_too() -> None:
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)
    a = state() | {"q": quantized, "s": torch.eye(3).to_sparse()}
    b = state() | {"q": quantized, "s": (2 * torch.eye(3)).to_sparse()}
    assert diff_states(a, b).others == Others(changed=1, unchanged=6, gone=0, new=0)


def test_states_without_norm_layers() -> None:
    difference = diff_states({"w": torch.ones(2)}, {"w": torch.zeros(2)})
    assert not difference
    assert difference.layers == 0


# ---------------------------------------------------------------------------------- how it is told


def test_the_text_names_layer_tensor_channel_and_size() -> None:
    a, b = state(), state()
    b["1.running_mean"][2] += 0.5
    b["3.1.num_batches_tracked"] += 1
    lines = str(diff_states(a, b)).splitlines()
    assert lines[0] == "2 differences: 2 of 3 norm layers changed"
    assert lines[2].split() == ["layer", "tensor", "changed", "channel", "before", "after", "by"]
    before, after = float(a["1.running_mean"][2]), float(b["1.running_mean"][2])
    assert lines[3].split() == [
        *("1", "running_mean", "1", "of", "4", "2"),
        *(f"{before:.7g}", f"{after:.7g}", "0.50"),
    ]
    assert lines[4].split() == [*("3.1", "num_batches_tracked", "1", "of", "1"), "7", "8", "1"]


def test_the_json_has_every_field() -> None:
    a, b = state(), state()
    b["1.weight"][0] = torch.nan
    read = json.loads(diff_states(a, b).to_json())
    assert read["layers"] == 3
    (change,) = read["changes"]
    assert change["path"] == "1"
    assert change["tensor"] == "weight"
    assert change["channel"] == 0
    assert change["after"] == "nan"
    assert read["others"] == {"changed": 0, "unchanged": 5, "gone": 0, "new": 0}


def test_control_characters_in_a_files_keys_are_not_printed() -> None:
    a = {"\x1b[31m.running_mean": torch.ones(1), "\x1b[31m.running_var": torch.ones(1)}
    b = {key: tensor + 1 for key, tensor in a.items()}
    assert "\x1b" not in str(diff_states(a, b))
    assert "\x1b" not in str(diff_states(a, {}))


# ------------------------------------------------------------------------------------------- keys


def test_clean_keys_takes_module_for_a_wrapper_only_if_every_key_has_it() -> None:
    one = torch.ones(1)
    assert list(clean_keys({"module.a": one, "module.b": one})) == ["a", "b"]
    assert list(clean_keys({"module.a": one, "head": one})) == ["module.a", "head"]
    assert list(clean_keys({"module.module.a": one})) == ["a"]
    assert list(clean_keys({"net._orig_mod.a": one, "module._orig_mod.b": one})) == [
        "net.a",
        "module.b",
    ]
    assert clean_keys({}) == {}


def test_clean_keys_never_loses_a_tensor() -> None:
    both = {"a": torch.ones(1), "_orig_mod.a": torch.zeros(1)}
    assert clean_keys(both).keys() == both.keys()


def test_norm_prefixes_need_both_statistics() -> None:
    one = torch.ones(1)
    assert norm_prefixes({"a.running_mean": one, "b.running_var": one}) == []
    assert norm_prefixes({"running_mean": one, "running_var": one}) == [""]
    assert norm_prefixes({"a.my_running_mean": one, "a.my_running_var": one}) == []
