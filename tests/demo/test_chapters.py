"""Each chapter's claim holds, at a fraction of the demo's size, and a missing drama is loud."""

from __future__ import annotations

import pytest

from stillnorm.demo import thread_001, thread_002, thread_003, thread_004
from stillnorm.demo.chapter import demand_drama
from stillnorm.demo.replay import _CHAPTERS, _REMEMBER
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
    frozen, train, evaluated, affine_false, _, held = thread_002.play().ways
    assert frozen.moved == train.moved == affine_false.moved > 1
    assert evaluated.moved == held.moved == 0
    assert {way.by for way in (frozen, train, affine_false)} == {"batch"}
    assert evaluated.by == held.by == "running"
    # The plain sum has no gradient through batch statistics; a random cotangent has.
    assert train.by_sum < 1e-6 < train.by_random
    assert held.by_random == pytest.approx(evaluated.by_random, rel=1e-6)


def test_thread_004_the_exporter_thaws_and_a_hold_does_not() -> None:
    exported, preserved, held = thread_004.play().exports
    assert (exported.training_before, exported.training_after) == (False, True)
    assert exported.moved > 0.05
    assert not preserved.training_after
    assert not held.training_after
    assert preserved.moved == held.moved == 0


def test_thread_001_half_precision_modes_and_what_holds_a_layer() -> None:
    foreign, ours = thread_001._halves()
    assert (foreign.dtype, ours.dtype) == ("float32", "float16")
    assert foreign.saved > 1.4 * ours.saved
    assert thread_001._overridden() == ("FreezingNet.train()", True)
    net = thread_001.Net(True, 0.1)
    assert thread_001._modes_come_back(net)


def test_a_chapter_is_told_in_a_terminal_and_on_a_page() -> None:
    told = thread_002.play()
    brief = text.write(told.document(3))
    assert "running_mean moved" in brief
    assert max(map(len, brief.splitlines())) <= 100
    assert "running_mean moved" in html.write(told.document(3))


def test_a_fault_that_does_not_happen_is_an_error() -> None:
    with pytest.raises(StillnormError, match="thread 003 did not happen"):
        demand_drama("003", "train-mode and eval accuracy", 0.98, 0.96)
    with pytest.raises(StillnormError, match="did not happen"):
        demand_drama("003", "train-mode and eval accuracy", float("nan"), 0.96)


def test_the_table_of_ten_numbers_names_chapters_that_exist() -> None:
    threads = {module.__name__.rpartition("_")[2] for module in _CHAPTERS}
    assert len(_REMEMBER) == 10
    assert {thread for thread, *_ in _REMEMBER} == threads
