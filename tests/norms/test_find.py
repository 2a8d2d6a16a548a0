"""find_norms: every norm layer there is, once, in order, whoever made it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

import stillnorm as sn
from stillnorm.norms import find_norms
from support import layers, zoo
from support.fingerprint import Fingerprint
from support.layers import CASES


def kinds(model: nn.Module) -> dict[str, str]:
    return {norm.path: norm.kind for norm in find_norms(model)}


@pytest.mark.parametrize("name", CASES)
def test_every_kind(name: str) -> None:
    layer = layers.make(name)
    assert kinds(nn.Sequential(nn.ReLU(), layer)) == {"1": type(layer).__name__}


@pytest.mark.parametrize(
    "make",
    [
        nn.LazyBatchNorm1d,
        nn.LazyBatchNorm2d,
        nn.LazyBatchNorm3d,
        nn.LazyInstanceNorm1d,
        nn.LazyInstanceNorm2d,
        nn.LazyInstanceNorm3d,
        lambda: nn.InstanceNorm2d(3),
        lambda: nn.BatchNorm2d(3, track_running_stats=False),
    ],
)
def test_layers_without_statistics_or_size_are_seen_too(make: type[nn.Module]) -> None:
    (norm,) = find_norms(make())
    assert norm.path == ""


@pytest.mark.parametrize(
    "other",
    [
        nn.LayerNorm(4),
        nn.GroupNorm(2, 4),
        nn.RMSNorm(4),
        nn.LocalResponseNorm(2),
        nn.Identity(),
        nn.Conv2d(3, 4, 1),
    ],
)
def test_what_is_no_norm_with_statistics_is_left_out(other: nn.Module) -> None:
    assert find_norms(nn.Sequential(other)) == ()


def test_a_class_that_is_only_called_like_a_frozen_norm_is_left_out() -> None:
    class FrozenBatchNormConfig(nn.Module):
        pass

    class FrozenBatchNorm2d(nn.Module):  # with trainable affine: nobody's frozen layer
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.bias = nn.Parameter(torch.zeros(3))
            self.register_buffer("running_mean", torch.zeros(3))
            self.register_buffer("running_var", torch.ones(3))

    assert find_norms(nn.Sequential(FrozenBatchNormConfig(), FrozenBatchNorm2d())) == ()


def test_registration_order_and_every_path() -> None:
    """A layer registered twice is one layer with two paths; None children are skipped."""
    shared = nn.BatchNorm2d(4)
    net = nn.Module()
    net.first = nn.Sequential(shared, nn.BatchNorm2d(4))
    net.nothing = None
    net.second = shared
    net.third = nn.ModuleDict({"x": shared, "y": nn.ModuleList([nn.BatchNorm1d(2)])})
    norms = find_norms(net)
    assert [norm.paths for norm in norms] == [
        ("first.0", "second", "third.x"),
        ("first.1",),
        ("third.y.0",),
    ]
    assert norms[0].module is shared
    assert norms[0].ancestors == (net, net.first)
    assert norms[0].elsewhere == (net.third,)
    assert norms[2].above == (net, net.third, net.third["y"])


def test_a_shared_block_gives_its_layers_both_paths() -> None:
    block = nn.Sequential(nn.BatchNorm2d(4))
    net = nn.Sequential(block, nn.ReLU(), block)
    assert [norm.paths for norm in find_norms(net)] == [("0.0", "2.0")]


def test_held_layers_keep_their_name() -> None:
    net = layers.conv_net()
    before = kinds(net)
    sn.freeze(net)
    assert kinds(net) == before


def test_scripted_layers_are_recognised() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))
    (norm,) = find_norms(scripted)
    assert (norm.path, norm.kind, norm.num_features) == ("0", "BatchNorm2d", 4)
    assert norm.is_scripted
    assert norm.normalizes_by(training=True) == "batch"


@pytest.mark.parametrize("name", zoo.CLASSIFIERS)
def test_all_of_a_real_architecture(name: str) -> None:
    """Against a plain isinstance loop over named_modules()."""
    net = zoo.CLASSIFIERS[name]()
    expected = [
        path
        for path, module in net.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    assert [norm.path for norm in find_norms(net)] == expected
    assert len(expected) > 5


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/resnet10t"])
def test_under_wrappers_the_paths_are_the_same(name: str) -> None:
    net = zoo.CLASSIFIERS[name]()
    paths = [norm.path for norm in find_norms(net)]
    wrapped = {
        "DataParallel": DataParallel(net),
        "compile": torch.compile(net, backend="eager"),
        "compiled DataParallel": torch.compile(DataParallel(net), backend="eager"),
        "AveragedModel": torch.optim.swa_utils.AveragedModel(net),
    }
    for how, model in wrapped.items():
        assert [norm.path for norm in find_norms(model)] == paths, how


def test_only_looks() -> None:
    net = nn.Sequential(layers.conv_net(), nn.LazyBatchNorm2d(), layers.make("own train()"))
    before = Fingerprint(net)
    find_norms(net)
    repr(find_norms(net))
    assert Fingerprint(net).differences(before) == []


def test_views_are_live() -> None:
    layer = nn.BatchNorm2d(4)
    (norm,) = find_norms(layer)
    layer.momentum = 0.3
    layer.running_mean = torch.ones(4)
    assert norm.momentum == 0.3
    assert norm.running_mean is layer.running_mean
    assert copy.deepcopy(layer) is not norm.module
