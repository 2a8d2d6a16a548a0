"""What goes wrong in other libraries' freezing, one test each: it must not go wrong here.

torchvision, detectron2, timm, open_clip and transformers replace layers by frozen ones;
mmdetection, fastai, Lightning and segmentation_models set flags. Each test names its failure.
"""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import stillnorm as sn
from stillnorm.norms import find_norms
from support import layers
from support.fingerprint import Fingerprint, bits
from support.zoo import timm, torchvision, transformers

BFLOAT16 = torch.bfloat16


def net_of(*names: str) -> nn.Sequential:
    return nn.Sequential(*(layers.make(name, seed) for seed, name in enumerate(names, 1)))


# ------------------------------------------------------------------------- torchvision, 1.1


def test_half_inputs_stay_half() -> None:
    """torchvision.ops.FrozenBatchNorm2d turns bfloat16 and float16 into float32."""
    x = layers.example("2d", dtype=BFLOAT16)
    assert torchvision.ops.FrozenBatchNorm2d(4)(x).dtype == torch.float32  # the failure
    layer = layers.make("2d")
    sn.freeze(layer)
    assert layer(x).dtype == BFLOAT16


def test_autocast_is_not_promoted_downstream() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layers.make("2d"), nn.ReLU())
    sn.freeze(net)
    with torch.autocast("cpu", dtype=BFLOAT16):
        assert net(torch.randn(2, 3, 4, 4)).dtype == BFLOAT16


def test_num_batches_tracked_stays_in_the_state_dict() -> None:
    """The frozen layers of torchvision, timm and transformers drop it, and the file differs."""
    net = layers.conv_net()
    keys = list(net.state_dict())
    sn.freeze(net)
    assert list(net.state_dict()) == keys
    assert int(net.state_dict()["1.num_batches_tracked"]) == 7


def test_eps_is_kept() -> None:
    """FrozenBatchNorm2d once had eps 0; transformers' replacement says 1e-5 whatever eps was."""
    for eps in (1e-3, 0.1, 0.0):
        layer = layers.settle(nn.BatchNorm2d(4))
        layer.eps = eps
        expected = layer.eval()(layers.example("2d"))
        sn.freeze(layer)
        assert torch.equal(layer(layers.example("2d")), expected)


# ------------------------------------------------------------------------- detectron2, 1.2


@pytest.mark.parametrize("name", ["1d", "1d-flat", "3d", "sync", "instance2d"])
def test_other_ranks_are_not_left_live(name: str) -> None:
    """detectron2's and timm's converters leave BatchNorm1d and 3d alone without a word."""
    net = net_of(name)
    assert sn.freeze(net).frozen == ("0",)
    before = {k: bits(t) for k, t in net.state_dict().items()}
    net.train()(layers.example(name))
    assert {k: bits(t) for k, t in net.state_dict().items()} == before


def test_the_activation_of_a_subclass_is_kept() -> None:
    """detectron2 and transformers turn a BatchNormAct2d into a norm without its activation."""
    layer = layers.make("timm BatchNormAct2d")
    expected = layer.eval()(layers.example("2d"))
    sn.freeze(layer)
    assert torch.equal(layer.train()(layers.example("2d")), expected)


def test_a_layer_registered_twice_is_frozen_under_both_names() -> None:
    """named_children() shows a layer once: the second name keeps the live one."""
    net = nn.Module()
    net.a = net.b = layers.make("2d")
    sn.freeze(net)
    assert net.a is net.b
    before = bits(net.b.running_mean)
    net.train()
    net.b(layers.example("2d"))
    assert bits(net.b.running_mean) == before


@pytest.mark.parametrize("name", ["affine=False", "bias=False"])
def test_layers_without_weight_or_bias(name: str) -> None:
    """AttributeError in transformers; with bias=False also in detectron2 and timm."""
    if name not in layers.CASES:
        assert "bias" not in inspect.signature(nn.BatchNorm2d).parameters
        return
    net = net_of(name)
    assert sn.freeze(net, strict=True).frozen == ("0",)


def test_one_layer_without_statistics_does_not_stop_the_rest() -> None:
    """timm fails in the middle and leaves ['Frozen', 'BatchNorm', 'BatchNorm']."""
    net = nn.Sequential(
        layers.make("2d"), nn.BatchNorm2d(4, track_running_stats=False), layers.make("2d")
    )
    report = sn.freeze(net)
    assert report.frozen == ("0", "2")
    assert [path for path, _ in report.refused] == ["1"]


def test_sync_batch_norm_comes_back_as_it_was() -> None:
    """Round trips of detectron2 and timm return a BatchNorm2d."""
    net = net_of("sync")
    sn.freeze(net)
    sn.unfreeze(net)
    assert type(net[0]) is nn.SyncBatchNorm


# ------------------------------------------------------------------------- timm, 1.3


def test_round_trip_keeps_momentum_counters_hooks_flags_and_gradients_required() -> None:
    """timm: momentum .03 -> .1, hooks 1 -> 0, requires_grad False -> True, counter 7 -> 0."""
    net = net_of("2d").train()
    net[0].momentum = 0.03
    net[0].weight.requires_grad_(False)
    calls = []
    net[0].register_forward_hook(lambda *args: calls.append(1))
    net[0].eval()
    before = Fingerprint(net)
    sn.freeze(net)
    sn.unfreeze(net)
    assert Fingerprint(net).differences(before) == []
    assert (net[0].momentum, net[0].weight.requires_grad, net[0].training) == (0.03, False, False)
    net(layers.example("2d"))
    assert calls == [1]


def test_foreign_layers_are_said_to_stay() -> None:
    """timm's unfreeze raises AttributeError on a layer that torchvision built."""
    net = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(4), layers.make("2d"))
    sn.freeze(net)
    report = sn.unfreeze(net)
    assert report.unfrozen == ("1",)
    assert [path for path, _ in report.refused] == ["0"]


def test_statistics_are_not_shared_with_another_layer() -> None:
    """A replaced layer's buffers alias the original's; here there is one layer only."""
    net = net_of("2d")
    pointer = net[0].running_mean.data_ptr()
    sn.freeze(net)
    assert net[0].running_mean.data_ptr() == pointer
    twin = copy.deepcopy(net)
    assert twin[0].running_mean.data_ptr() != pointer


def test_normed_efficientnet_does_not_explode() -> None:
    """timm#1631: a frozen EfficientNet returned 1e21."""
    net = layers.settle(timm.create_model("efficientnet_lite0", num_classes=3))
    for norm in find_norms(net):
        norm.module.running_mean.zero_()
        norm.module.running_var.fill_(0.5)
    x = torch.randn(1, 3, 32, 32)
    expected = net.eval()(x)
    sn.freeze(net)
    assert torch.equal(net(x), expected)


# ------------------------------------------------------------------------- open_clip, 1.4


def test_an_empty_selection_is_an_error_and_not_everything() -> None:
    """open_clip's freeze with an empty match set freezes the whole tower."""
    net = layers.conv_net()
    with pytest.raises(sn.StillnormError, match="empty"):
        sn.freeze(net, [])
    assert not any(norm.hold for norm in find_norms(net))


# ------------------------------------------------------------------------- transformers, 1.5


def test_a_root_norm_is_frozen_and_stays_the_same_object() -> None:
    """transformers leaves a root as it is; timm returns another object."""
    layer = layers.make("2d")
    assert sn.freeze(layer).frozen == ("",)
    assert sn.is_frozen(layer)


def test_a_frozen_model_can_be_copied() -> None:
    """transformers' buffers become non-leaf tensors, and deepcopy raises."""
    net = layers.conv_net()
    sn.freeze(net)
    copy.deepcopy(net)
    assert all(t.is_leaf and not t.requires_grad for t in net.buffers())


def test_a_detr_backbone_of_transformers_is_already_frozen() -> None:
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], out_features=["stage2"]
        ),
        encoder_layers=1,
        decoder_layers=1,
        d_model=16,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    net = transformers.DetrModel(config)
    norms = find_norms(net)
    assert norms
    assert {norm.provider for norm in norms} == {"transformers"}
    assert len(sn.freeze(net, strict=True).already_frozen) == len(norms)
    assert sn.is_frozen(net)


# ------------------------------------------------------------------------- flags, 1.6, 1.14 - 1.16


def test_freezing_is_by_running_statistics_not_only_without_updates() -> None:
    """Lightning's train_bn=False switches tracking off: it normalises by the batch all the same."""
    net = net_of("2d")
    theirs = copy.deepcopy(net)
    theirs[0].track_running_stats = False
    x = 5 + layers.example("2d")
    sn.freeze(net)
    assert not torch.allclose(theirs.train()(x), theirs.eval()(x))  # the failure
    assert torch.equal(net.train()(x), net.eval()(x))


def test_train_of_a_part_does_not_thaw() -> None:
    """segmentation_models and mmdetection hold through train() of the whole model only."""
    net = layers.conv_net()
    sn.freeze(net, "3")
    net[3].train()
    net[3][1].train()
    assert not net[3][1].training
    assert sn.is_frozen(net, "3")


def test_the_rest_of_a_frozen_part_goes_to_eval() -> None:
    """segmentation_models leaves stochastic depth on in eval mode inside a frozen encoder."""
    net = nn.Sequential(nn.Sequential(layers.make("2d"), nn.Dropout()))
    net.train()
    sn.freeze(net, "0")
    net.eval()
    assert not net[0][1].training


def test_all_subclasses_of_norms_are_recognised() -> None:
    """fx, quantisation and fastai look for exact types: subclasses slip through."""
    for name in ("subclass", "own F.batch_norm", "grandchild", "timm BatchNormAct2d"):
        assert sn.freeze(net_of(name)).frozen == ("0",)


def test_memory_is_saved_where_eval_mode_saves_none() -> None:
    """Flags never save memory: an eval-mode layer keeps its whole input, affine frozen or not."""

    def saved(net: nn.Module) -> int:
        total = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net(torch.randn(8, 4, 16, 16, requires_grad=True))
        return total

    flags, held = net_of("2d").eval().requires_grad_(False), net_of("2d")
    sn.freeze(held)
    activation = 8 * 4 * 16 * 16 * 4
    assert saved(flags) >= activation
    assert saved(held) == 2 * 4 * 4  # var and weight


def test_evaluation_that_ends_with_train_does_not_thaw() -> None:
    """pytorch#66073, #86590, gt-pyg#112, mmdetection#560: the loop calls model.train() again."""
    net = layers.conv_net()
    sn.freeze(net)
    before = {k: bits(t) for k, t in net.state_dict().items() if "running" in k}
    for _ in range(2):
        net.train()
        net(layers.conv_input()).sum().backward()
        net.eval()
        net(layers.conv_input())
    net.train()
    net(layers.conv_input())
    assert {k: bits(net.state_dict()[k]) for k in before} == before


def test_class_level_tools_that_loop_over_types_still_fuse() -> None:
    """A held layer in eval mode goes through torch's own fusion of a pair."""
    conv, norm = nn.Conv2d(3, 4, 1).eval(), layers.make("2d").eval()
    x = torch.randn(2, 3, 5, 5)
    expected = norm(conv(x))
    sn.freeze(norm)
    fused = nn.utils.fusion.fuse_conv_bn_eval(conv, norm)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)
