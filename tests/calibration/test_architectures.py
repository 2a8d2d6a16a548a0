"""Recalibration of real architectures, each layer against its own recorded inputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibration.received import assert_exact, recording
from stillnorm import recalibrate
from support.fingerprint import Fingerprint
from support.zoo import CLASSIFIERS, images, make


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_layer_is_exact_and_undo_is_too(name: str) -> None:
    net = make(name).train()
    batches = [images(n, seed=n) for n in (6, 3)]
    before = Fingerprint(net, versions=False)
    with recording(net) as received:
        report = recalibrate(net, batches)
    assert_exact(received)
    assert len(report.layers) == len(received)
    assert report.unreached == report.held == report.refused == ()
    report.undo()
    assert not Fingerprint(net, versions=False).differences(before)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/efficientnet_lite0"])
def test_channels_last_models_are_exact(name: str) -> None:
    net = make(name).to(memory_format=torch.channels_last)
    batches = [images(n, seed=n).to(memory_format=torch.channels_last) for n in (6, 3)]
    with recording(net) as received:
        recalibrate(net, batches)
    assert any(not x[0].is_contiguous() for x in received.values()), "channels_last arrived"
    assert_exact(received)


def test_bfloat16_models_are_exact_to_their_rounding() -> None:
    net = make("torchvision/resnet18").bfloat16()
    with recording(net) as received:
        recalibrate(net, [images(n, seed=n).bfloat16() for n in (6, 3)])
    assert_exact(received)


def test_a_ruined_model_answers_again_as_it_did_in_training() -> None:
    """The statistics lost, weights intact: eval agrees with train mode again."""
    net = make("torchvision/resnet18")
    x = images(64)
    torchs = net.train()(x).detach()
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    ruined = net.eval()(x)
    recalibrate(net, x)
    repaired = net.eval()(x)
    scale = torchs.std()
    assert (ruined - torchs).std() > scale, "the near miss: it was ruined"
    assert (repaired - torchs).std() < 0.01 * scale
