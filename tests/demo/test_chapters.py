"""Each chapter's claim holds, at a fraction of the demo's size, and a missing drama is loud."""

from __future__ import annotations

import pytest

from stillnorm.demo import half, thread_001, thread_002, thread_003, thread_004
from stillnorm.demo.chapter import demand_drama
from stillnorm.errors import StillnormError
from stillnorm.reports import html, text


def test_thread_003_one_norm_per_call_repairs_what_recalibration_cannot() -> None:
    told = thread_003.play(epochs=1)
    assert told.weights_untouched
    assert told.train_mode - told.eval > 0.3
    assert told.one_norm_per_call > max(told.recalibrated, told.train_mode - 0.05)
    found = {finding.code: set(finding.paths) for finding in told.report.findings}
    assert found["SN201"] == {"bn_2", "bn_6", "bn_7"}
    assert found["SN203"] == {"bn_5"}
    assert found["SN114"] == {"bn_1", "bn_3"}


def test_thread_002_the_mean_moves_with_the_mode_and_not_with_the_affine_parameters() -> None:
    told = thread_002.play(side=20)
    frozen, train, evaluated, affine_false, _ = told.his
    assert frozen.mean_moved == train.mean_moved == affine_false.mean_moved > 1
    assert evaluated.mean_moved == 0
    assert {case.normalizes_by for case in (frozen, train, affine_false)} == {"batch"}
    assert evaluated.normalizes_by == "running"
    # A plain sum has no gradient through batch statistics; a random cotangent has.
    assert train.by_sum.abs().max() < 1e-6 < train.by_random.abs().max()
    for held in told.held:
        assert (held.mean_moved, held.normalizes_by) == (0, "running")


def test_thread_004_the_exporter_thaws_and_a_hold_does_not() -> None:
    told = thread_004.play()
    assert (told.plain.before, told.plain.after) == (False, True)
    assert told.plain.moved > 0.05
    for kept in (told.held, told.preserved, told.default):
        if kept is not None:
            assert (kept.before, kept.after, kept.moved) == (False, False, 0)


def test_thread_001_a_held_layer_keeps_half_precision_and_the_error_is_the_posted_one() -> None:
    frozen = {layer.name: layer for layer in half.under_autocast(0)}
    held = next(layer for name, layer in frozen.items() if "stillnorm" in name)
    assert held.dtype == "float16"
    # eval() keeps its input for backward; the held layer only what the ReLU needs.
    assert frozen["eval()"].saved_bytes == 2 * held.saved_bytes
    assert "Half" in half.half_error()
    assert "Float" in half.half_error()


def test_thread_001_momentum_copied_from_keras_costs_accuracy() -> None:
    told = thread_001.play()
    assert told.torch_momentum - told.keras_momentum > 0.05
    assert told.held_by == "MyNet.train()"
    assert told.moved_without_gradient > 0
    assert told.thawed_by_eval_mode == 0 < told.thawed_by_loop
    assert "SN108" in {finding.code for finding in told.report.findings}


def test_a_chapter_is_told_in_a_terminal_and_on_a_page() -> None:
    told = thread_002.play(side=20)
    brief = text.write(told.document(3))
    assert "running_mean" in brief
    assert max(map(len, brief.splitlines())) <= 100
    assert "running_mean" in html.write(told.document(3))


def test_a_fault_that_does_not_happen_is_an_error() -> None:
    with pytest.raises(StillnormError, match="thread 003 did not happen"):
        demand_drama("003", "train-mode and eval accuracy", 0.98, 0.96)
    with pytest.raises(StillnormError, match="did not happen"):
        demand_drama("003", "train-mode and eval accuracy", float("nan"), 0.96)
