"""SN601: what a checkpoint must have had is missed; what other norms never have is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diagnosis.nets import conv_net, found
from stillnorm import check
from stillnorm.diagnosis import Report
from support import zoo

State = dict[str, Tensor]


def state(model: nn.Module | None = None) -> State:
    return dict((model or conv_net()).state_dict())


def without(state: State, *ends: str) -> State:
    return {key: tensor for key, tensor in state.items() if not key.endswith(ends)}


def look(state: State) -> Report:
    report = check(state, select="SN601")
    assert not report.crashed, report.crashed
    return report


def test_a_mean_without_a_variance_and_the_reverse() -> None:
    for lost, kept in (("running_var", "running_mean"), ("running_mean", "running_var")):
        (finding,) = look(without(state(), f"4.{lost}")).findings
        assert (finding.severity, finding.paths) == ("error", ("4",))
        assert finding.evidence["missing"] == {"4": (lost,)}
        assert finding.message == f"1 norm layer without {lost}: loaded, the initial value stays"
        assert kept in str(finding.table)


def test_a_count_of_batches_without_statistics() -> None:
    (finding,) = look(without(state(), "running_mean", "running_var")).findings
    assert finding.paths == ("1", "4")
    assert "without running_mean and running_var" in finding.message


def test_a_layer_whose_namesakes_have_statistics() -> None:
    whole = state(zoo.torchvision.models.resnet18())
    affine = ("weight", "bias")
    lost = {k: t for k, t in whole.items() if "layer3.1.bn2" not in k or k.endswith(affine)}
    assert found(look(lost)) == {"SN601": ("layer3.1.bn2",)}


def test_the_root_itself() -> None:
    assert found(look(without(state(nn.BatchNorm1d(3)), "running_var"))) == {"SN601": ("",)}


def vit() -> nn.Module:
    return zoo.timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)


@pytest.mark.parametrize(
    "model",
    [
        conv_net,
        lambda: conv_net(affine=False),
        lambda: conv_net(track_running_stats=False),
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)),
        lambda: nn.Sequential(nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(4)),
        lambda: nn.Linear(2, 2),
        vit,
        lambda: zoo.torchvision.models.resnet18(norm_layer=lambda c: nn.GroupNorm(2, c)),
        lambda: zoo.timm.create_model("test_coatnet"),  # BatchNorm and LayerNorm, both "norm1"
        lambda: zoo.timm.create_model("resnetv2_50", layers=(1, 1, 1, 1)),
    ],
)
def test_whole_checkpoints_are_silent(model: Callable[[], nn.Module]) -> None:
    assert look(state(model())).findings == ()


@pytest.mark.parametrize("name", sorted(zoo.CLASSIFIERS))
def test_real_models_are_silent(name: str) -> None:
    report = look(state(zoo.CLASSIFIERS[name]()))
    assert (report.findings, report.not_run) == ((), ())


def test_checkpoints_from_before_counters_are_silent() -> None:
    assert look(without(state(), "num_batches_tracked")).findings == ()


def test_modules_that_only_look_like_norms_are_silent() -> None:
    ones = torch.ones(4)
    others = {
        "quantizer.num_batches_tracked": torch.tensor(3),
        "quantizer.codebook": torch.ones(4, 2),
        "normalizer.running_mean": ones,  # another library's own
        "normalizer.running_std": ones,
        "fc.weight": torch.ones(4, 4),
        "fc.bias": ones,
    }
    assert look(state() | others).findings == ()


def test_parameters_alone_cannot_be_told_from_group_norm() -> None:
    model = zoo.torchvision.models.resnet18()
    (missed,) = look(dict(model.named_parameters())).not_run
    assert missed.reason.startswith("17 layers called batch norm and no running statistics")
    grouped = zoo.torchvision.models.resnet18(norm_layer=lambda c: nn.GroupNorm(2, c))
    assert look(state(grouped)).not_run == (missed,)


def test_one_file_of_several_cannot_be_decided(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.safetensors"
    save_file(without(state(), "running_var"), path)
    (missed,) = check(path, select="SN601").not_run
    assert missed.reason == "the rest of the checkpoint is in other files"


def test_a_model_is_not_a_checkpoint() -> None:
    assert check(conv_net(), select="SN601").not_run[0].reason == "needs a checkpoint file"


def test_other_rules_do_not_report_the_same() -> None:
    lost = without(state(), "4.running_var")
    assert found(check(lost)) == {"SN601": ("4",)}
