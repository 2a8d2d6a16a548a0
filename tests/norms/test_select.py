"""The selector: globs, modules, classes, predicates, collections; and the error when none fits."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import stillnorm as sn
from stillnorm.errors import SelectorError, StillnormError
from stillnorm.norms import find_norms, select
from support import layers, zoo
from support.fingerprint import Fingerprint
from support.zoo import torchvision


def resnet() -> nn.Module:
    return torchvision.models.resnet18(num_classes=4)


RESNET = resnet()
ALL = [norm.path for norm in find_norms(RESNET)]


def paths(selector: Any, model: nn.Module = RESNET) -> list[str]:
    return [norm.path for norm in select(model, selector)]


def under(*prefixes: str) -> list[str]:
    return [p for p in ALL if any(p == q or p.startswith(f"{q}.") for q in prefixes)]


SELECTORS: dict[str, tuple[Any, list[str]]] = {
    "all": (None, ALL),
    "star": ("*", ALL),
    "a layer": ("layer1.0.bn1", ["layer1.0.bn1"]),
    "a subtree": ("layer1", under("layer1")),
    "a deeper subtree": ("layer1.0", under("layer1.0")),
    "a component, not a prefix": ("layer1.0.bn", []),
    "a star in the middle": ("layer1.*.bn2", ["layer1.0.bn2", "layer1.1.bn2"]),
    "stars do not cross dots": ("layer*.bn2", []),
    "a set of characters": ("layer[12]", under("layer1", "layer2")),
    "a question mark": (
        "layer?.0.downsample",
        under(*(f"layer{i}.0.downsample" for i in (2, 3, 4))),
    ),
    "case counts": ("Layer1", []),
    "no regular expressions": ("layer.", []),
    "a module": (RESNET.layer2, under("layer2")),
    "a norm layer": (RESNET.bn1, ["bn1"]),
    "the model": (RESNET, ALL),
    "a class of layers": (nn.BatchNorm2d, ALL),
    "a base class": (nn.modules.batchnorm._BatchNorm, ALL),
    "a class around them": (
        torchvision.models.resnet.BasicBlock,
        under("layer1", "layer2", "layer3", "layer4"),
    ),
    "another class": (nn.BatchNorm1d, []),
    "a class without norms": (nn.Linear, []),
    "a predicate": (lambda path, module: module.num_features == 512, under("layer4")),
    "a predicate of paths": (
        lambda path, module: path.endswith("bn2"),
        [p for p in ALL if p.endswith("bn2")],
    ),
    "a list": (["bn1", "layer4"], under("bn1", "layer4")),
    "a tuple": (("layer4", "bn1"), under("bn1", "layer4")),
    "a set": ({"layer4", "bn1"}, under("bn1", "layer4")),
    "a generator": ((p for p in ("layer4", "bn1")), under("bn1", "layer4")),
    "nested": (
        [["bn1"], [RESNET.layer4, lambda path, module: path == "bn1"]],
        under("bn1", "layer4"),
    ),
    "overlapping": (["layer1", "layer1.0", RESNET.layer1], under("layer1")),
    "with an empty string": ("", []),
    "with a trailing dot": ("layer1.", []),
}


@pytest.mark.parametrize("name", SELECTORS)
def test_selects(name: str) -> None:
    """In registration order whatever the order given; matching nothing is an error."""
    selector, expected = SELECTORS[name]
    if expected:
        assert paths(selector) == expected
    else:
        with pytest.raises(SelectorError):
            paths(selector)


def test_every_part_of_a_collection_must_match() -> None:
    """A misspelt second entry must not be swallowed by the first."""
    with pytest.raises(SelectorError, match="'layr2'"):
        select(RESNET, ["layer1", "layr2"])


def test_any_path_of_a_shared_layer_selects_it() -> None:
    shared = nn.BatchNorm2d(4)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    for selector in ("a", "b", "b.0", lambda path, module: path == "b.0"):
        (norm,) = select(net, selector)
        assert norm.paths == ("a", "b.0")


def test_held_layers_are_selected_by_their_old_class() -> None:
    net = layers.conv_net()
    sn.freeze(net)
    assert paths(nn.BatchNorm2d, net) == ["1", "3.1"]
    assert paths(nn.BatchNorm1d, net) == ["6"]


def test_a_class_that_holds_the_shared_layer_under_a_second_parent() -> None:
    """The first path is not the only one that counts."""

    class Head(nn.Module):
        def __init__(self, bn: nn.Module) -> None:
            super().__init__()
            self.bn = bn

    shared = nn.BatchNorm2d(4)
    net = nn.ModuleList([nn.Sequential(shared), Head(shared)])
    assert paths(Head, net) == ["0.0"]


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("selector", "words"),
    [
        ("layer1.0.bn3", ["matches no norm layer of ResNet", "layer1.0.bn"]),
        ("layr1", ["nearest", "layer1"]),
        ("layer5.0.bn1", ["layer"]),
        ("conv1", ["there is no norm layer in it", "nearest"]),
        ("fc", ["there is no norm layer in it"]),
        (nn.BatchNorm1d, ["BatchNorm1d", "BatchNorm2d"]),
        (RESNET.conv1, ["no norm layer in it"]),
        (nn.BatchNorm2d(4), ["is not part of ResNet", "copy"]),
        (lambda path, module: False, ["predicate"]),
        ([], ["empty"]),
        (set(), ["empty"]),
        (3, ["int"]),
        (2.5, ["float"]),
    ],
)
def test_the_error_says_what_and_what_is_near(selector: Any, words: list[str]) -> None:
    before = Fingerprint(RESNET.layer1)
    with pytest.raises(SelectorError) as error:
        select(RESNET, selector)
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, StillnormError)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert Fingerprint(RESNET.layer1).differences(before) == []


def test_a_model_without_norms() -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    assert select(net) == ()
    with pytest.raises(SelectorError, match="Sequential has no norm layers"):
        select(net, "0")


def test_a_predicate_that_raises_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        select(RESNET, lambda path, module: 1 // 0)


def test_nearest_are_near() -> None:
    """One letter wrong anywhere in a real path: a path that differs by it is proposed."""
    for path in ALL:
        for position in range(len(path)):
            if path[position] == ".":
                continue
            wrong = f"{path[:position]}x{path[position + 1 :]}"
            with pytest.raises(SelectorError) as error:
                select(RESNET, wrong)
            near = error.value.help.removeprefix("nearest: ").split(", ")
            differ = [sum(map(str.__ne__, wrong, n)) for n in near if len(n) == len(wrong)]
            assert min(differ, default=9) == 1, (wrong, near)


# ------------------------------------------------------------------------------- properties


SOME = ("torchvision/shufflenet_v2_x0_5", "timm/ghostnet_050", "transformers/resnet")


@given(st.sampled_from(SOME), st.data())
def test_a_path_selects_exactly_its_subtree(name: str, data: st.DataObject) -> None:
    """Over real architectures: any module's path selects the norm layers inside that module."""
    model = _built(name)
    path, module = data.draw(st.sampled_from(list(model.named_modules())))
    inside = {id(m) for m in module.modules()}
    expected = [norm.path for norm in find_norms(model) if id(norm.module) in inside]
    if path and expected:
        assert paths(path, model) == expected
        assert paths(module, model) == expected


@cache
def _built(name: str) -> nn.Module:
    return zoo.CLASSIFIERS[name]()
