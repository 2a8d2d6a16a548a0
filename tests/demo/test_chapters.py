"""Each chapter's claim holds at a fraction of the demo's size, and a missing drama is loud."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillnorm import recalibrate, split_shared
from stillnorm.demo import thread_000, thread_003
from stillnorm.demo.chapter import demand_drama
from stillnorm.demo.deeplab import DeepLabV2
from stillnorm.errors import StillnormError
from stillnorm.reports import Document, html, text


def test_thread_003_one_norm_per_call_repairs_what_recalibration_cannot(shared) -> None:
    assert shared.weights_untouched
    assert shared.train_mode - shared.eval > 0.3
    assert shared.one_norm_per_call > max(shared.recalibrated, shared.train_mode - 0.05)
    found = {finding.code: set(finding.paths) for finding in shared.report.findings}
    assert found["SN201"] == {"bn_2", "bn_6", "bn_7"}
    assert found["SN203"] == {"bn_5"}
    assert found["SN114"] == {"bn_1", "bn_3"}


def test_thread_003_names_the_lines_of_the_post(shared) -> None:
    (finding,) = (finding for finding in shared.report.findings if finding.code == "SN201")
    lines = thread_003.post("003").source.splitlines()
    for place in finding.where:
        file, line = place.split(":")
        assert file == "thread_003.py"
        assert lines[int(line) - 1].strip() == "x = self.bn_6(x)"


class OneNormPerCall(nn.Module):
    """The posted network with a norm of its own at each call, and the same weights."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        calls = ("bn_6", "bn_6", "bn_7", "bn_7", "bn_2", "bn_2", "bn_2", "bn_4", "bn_5")
        self.norms = nn.ModuleList(copy.deepcopy(net.get_submodule(path)) for path in calls)

    def forward(self, x: Tensor) -> Tensor:
        """Return the class scores."""
        net: Any = self.net
        bn = self.norms
        x = bn[0](F.relu(net.conv1(x)))
        x = bn[1](net.pool(F.relu(net.conv2(x))))
        x = bn[2](F.relu(net.conv3(x)))
        x = bn[3](net.pool(F.relu(net.conv4(x))))
        x = bn[4](net.cpdfc1(x))
        x = bn[5](net.cpdfc2(x))
        x = bn[6](net.cpdfc3(x))
        x = bn[7](F.relu(net.cpdfc4(x)))
        x = bn[8](net.conv2fc2(x))
        scores: Tensor = x.view(-1, net.num_classes)
        return scores


def test_thread_003_split_is_the_repair_by_hand() -> None:
    net = thread_003.post("003").make("Keras_Cifar2", 8, 8)
    by_hand = OneNormPerCall(copy.deepcopy(net))
    x = torch.rand(64, 3, 32, 32)
    recalibrate(by_hand, x)
    recalibrate(net, x)
    report = split_shared(net, x)
    assert [(one.path, one.calls) for one in report.split] == [
        ("bn_2", 3),
        ("bn_6", 2),
        ("bn_7", 2),
    ]
    torch.testing.assert_close(net.eval()(x), by_hand.eval()(x), rtol=0.05, atol=0.05)


def test_thread_000_the_audit_passes_and_eval_is_lost(momentum) -> None:
    assert momentum.audit_passes
    assert momentum.bit_equal
    assert momentum.train_mode - momentum.eval > 0.05
    assert "would normalise by the batch" in momentum.objection
    found = {finding.code: finding.paths for finding in momentum.report.findings}
    assert len(found["SN002"]) == 12


def test_thread_000_recalibration_rescues_and_a_hold_makes_one_function(momentum) -> None:
    assert momentum.recalibrated > momentum.train_mode
    assert momentum.held > momentum.before + 0.05
    assert momentum.held > momentum.held_at_his_rate
    assert momentum.difference == 0
    assert momentum.found_by_name == 12


def test_thread_000_the_audit_sees_a_statistic_that_moves() -> None:
    """His averages are no empty check: without momentum 0 they fail at the first step."""
    net = DeepLabV2(11).train()
    audit = thread_000.Audit(net)
    for _ in audit.after([torch.zeros(2)]):
        net(torch.randn(2, 3, 48, 48))
    assert not audit.passes


def test_thread_002_the_mean_moves_with_the_mode_and_not_with_the_affine(gradients) -> None:
    frozen, train, evaluated, affine_false, _ = gradients.his
    assert frozen.mean_moved == train.mean_moved == affine_false.mean_moved > 1
    assert evaluated.mean_moved == 0
    assert {case.normalizes_by for case in (frozen, train, affine_false)} == {"batch"}
    assert evaluated.normalizes_by == "running"


def test_thread_002_a_plain_sum_has_no_gradient_through_batch_statistics(gradients) -> None:
    train = gradients.his[1]
    assert train.by_sum.abs().max() < 1e-6 < train.by_random.abs().max()


def test_thread_002_a_held_layer_has_the_gradients_of_eval(gradients) -> None:
    for held in gradients.held:
        assert (held.mean_moved, held.normalizes_by) == (0, "running")
    assert [held.weight_learns for held in gradients.held] == [True, False]
    assert gradients.held_from_eval < 1e-5


def test_thread_004_the_exporter_thaws_and_a_hold_does_not(exporter) -> None:
    assert (exporter.plain.before, exporter.plain.after) == (False, True)
    assert exporter.plain.moved > 0.05
    assert exporter.used.layers[0].used == ("batch",)
    for kept in (exporter.held, exporter.preserved, exporter.default):
        if kept is not None:
            assert (kept.before, kept.after, kept.moved) == (False, False, 0)


def test_thread_001_a_held_layer_keeps_half_precision(conventions) -> None:
    frozen = {layer.name: layer for layer in conventions.frozen}
    held = frozen["stillnorm's held"]
    assert held.dtype == "float16"
    # eval() keeps the inputs of convolution, norm and ReLU; the held layer not that of the norm.
    assert frozen["eval()"].saved_bytes == 3 * held.saved_bytes / 2
    foreign = frozen["torchvision's frozen"]
    assert foreign.dtype == "float32"
    assert foreign.saved_bytes > held.saved_bytes


def test_thread_001_the_error_is_the_posted_one(conventions) -> None:
    assert conventions.half_error == "expected scalar type Half but found Float"


def test_thread_001_momentum_copied_from_keras_costs_accuracy(conventions) -> None:
    assert conventions.torch_momentum - conventions.keras_momentum > 0.05
    assert conventions.same_weights
    assert [finding.code for finding in conventions.report.findings] == ["SN108"]


def test_thread_001_what_else_the_post_says(conventions) -> None:
    assert conventions.held_by == "MyNet.train()"
    assert conventions.moved_without_gradient > 0
    assert (conventions.thawed_by_loop, conventions.thawed_by_eval_mode) == (8, 0)
    assert conventions.spread_with > 10 * conventions.spread_without
    with_norms, without = conventions.inputs
    assert len(with_norms.series) == len(without.series) == 3


def test_every_chapter_fits_a_terminal_and_a_page(
    shared, momentum, gradients, exporter, conventions
) -> None:
    for chapter in (shared, momentum, gradients, exporter, conventions):
        brief = text.write(chapter.document(1))
        assert brief.startswith(f"1  {chapter.title}\n")
        assert f"thread {chapter.thread}" in brief
        assert re.search(r"check: SN\d{3}", brief)
        assert max(map(len, brief.splitlines())) <= 100
        assert chapter.title in html.write(Document(chapter.title, chapter.page()))
        assert all(map(math.isfinite, chapter.numbers().values()))


def test_a_network_that_was_not_trained_shows_nothing_and_says_so() -> None:
    with pytest.raises(StillnormError, match="thread 003 did not happen"):
        thread_003.play(epochs=0)


@pytest.mark.parametrize(("right", "wrong"), [(0.98, 0.94), (0.5, 0.9), (float("nan"), 0.9)])
def test_a_fault_that_does_not_happen_is_an_error(right: float, wrong: float) -> None:
    with pytest.raises(StillnormError, match="did not happen"):
        demand_drama("003", "train-mode and eval accuracy", right, wrong)
    demand_drama("003", "train-mode and eval accuracy", 0.98, 0.92)
