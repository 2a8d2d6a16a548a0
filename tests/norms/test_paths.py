"""Paths: the names of named_modules() without what wrappers put into them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DataParallel

from stillnorm.norms import clean_path, find_norms, select, walk


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("layer1.0.bn1", "layer1.0.bn1"),
        ("module.layer1.bn", "layer1.bn"),
        ("_orig_mod.module.layer1.bn", "layer1.bn"),
        ("module._orig_mod.layer1.bn", "layer1.bn"),
        ("layer1._checkpoint_wrapped_module.bn", "layer1.bn"),
        ("_fsdp_wrapped_module.layer1._fsdp_wrapped_module.bn", "layer1.bn"),
        ("layer1.module.bn", "layer1.module.bn"),  # may be the user's own
        ("module", "module"),
        ("", ""),
    ],
)
def test_clean_path(raw: str, clean: str) -> None:
    assert clean_path(raw) == clean


class Two(nn.Module):
    """A user's own attribute `module`, beside another."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Sequential(nn.BatchNorm2d(2))
        self.head = nn.BatchNorm2d(2)


class Residual(nn.Module):
    """The idiom `self.module = inner` inside a network: nobody's wrapper."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.module = inner


def paths(model: nn.Module) -> list[str]:
    return [norm.path for norm in find_norms(model)]


def test_a_users_own_attribute_called_module_keeps_its_name() -> None:
    assert paths(Two()) == ["module.0", "head"]
    assert paths(nn.Sequential(Residual(nn.BatchNorm2d(2)))) == ["0.module"]


def test_wrappers_in_the_middle_are_left_out() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net = nn.Sequential(
        DataParallel(nn.BatchNorm2d(2)),
        torch.compile(nn.Sequential(nn.BatchNorm2d(2)), backend="eager"),
        checkpoint_wrapper(nn.Sequential(nn.BatchNorm2d(2))),
    )
    assert paths(net) == ["0", "1.0", "2.0"]


def test_an_average_of_weights_names_its_layers_as_the_model_does() -> None:
    """AveragedModel has a buffer of its own beside `module`, and no other child."""
    assert paths(torch.optim.swa_utils.AveragedModel(Two())) == ["module.0", "head"]


MODELS = {
    "plain": lambda: nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(2))),
    "own module": Two,
    "residual": lambda: nn.Sequential(Residual(nn.BatchNorm2d(2)), nn.BatchNorm2d(2)),
    "only a module": lambda: Residual(Two()),
    "nested": lambda: Residual(Residual(nn.Sequential(nn.BatchNorm2d(2)))),
    "DataParallel": lambda: DataParallel(Two()),
    "compiled": lambda: torch.compile(DataParallel(Two()), backend="eager"),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_path_and_every_raw_name_selects_its_layer(name: str) -> None:
    """What find_norms reports, and what named_modules() says, can be given back as layers=."""
    model = MODELS[name]()
    for norm in find_norms(model):
        for path in norm.paths:
            assert norm.module in [n.module for n in select(model, path)]
    raw = {id(module): path for path, module in model.named_modules()}
    for norm in find_norms(model):
        selected = [n.module for n in select(model, raw[id(norm.module)])]
        assert norm.module in selected, raw[id(norm.module)]


NAMES = st.sampled_from(["a", "b", "0", "module", "bn"])
TREES = st.recursive(
    st.just(None), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=8
)


def build(tree: dict[str, object] | None) -> nn.Module:
    if tree is None:
        return nn.BatchNorm1d(1)
    module = nn.Module()
    for name, inner in tree.items():
        module.add_module(name, build(inner))  # type: ignore[arg-type]
    return module


@given(TREES)
def test_any_tree(tree: dict[str, object] | None) -> None:
    """Over generated models: unique paths, in order, and each selects exactly its own subtree."""
    model = build(tree)
    norms = find_norms(model)
    found = [norm.path for norm in norms]
    assert [norm.module for norm in norms] == [
        m for m in model.modules() if isinstance(m, nn.BatchNorm1d)
    ]
    assert len(set(found)) == len(found)
    for norm in norms:
        assert norm.module in [n.module for n in select(model, norm.path)]
    for path, _, ancestors in walk(model):
        assert len(path.split(".")) <= len(ancestors) + 1
