"""Faults of modes, freezing and statistics."""

from __future__ import annotations

import pytest

from diagnosis.faults.grid import (
    FEW,
    MODELS,
    Fault,
    assert_found,
    assert_repaired,
    grid,
    repairs,
    subject,
)
from diagnosis.faults.injections import state as do
from diagnosis.nets import found
from stillnorm import check

FAULTS = (
    Fault("SN001", do.frozen_parameters, "warning", fix=True),
    Fault("SN001", do.frozen_parameters_with_data, "warning"),
    Fault("SN002", do.zero_momentum, "error", fix=True),
    Fault("SN003", do.single_eval, "warning", fix=True),
    Fault("SN004", do.frozen_identity, "error", fix=True),
    Fault("SN006", do.inference_in_train_mode, "error"),
    Fault("SN006", do.one_layer_left_in_train_mode, "error", on=FEW),
    Fault("SN007", do.train_without_return, "error"),
    Fault("SN007", do.kept_in_a_list, "error", on=FEW),
    Fault("SN008", do.toggled_tracking, "warning", fix=True),
    Fault("SN101", do.lost_statistics, "warning"),
    Fault("SN101", do.lost_statistics_with_data, "warning", fix=True),
    Fault("SN102", do.not_a_number, "error", fix=True),
    Fault("SN103", do.negative_variance, "error", fix=True),
    Fault("SN104", do.dead_channel, "warning"),
    Fault("SN105", do.moved_mean, "error", fix=True),
    Fault("SN105", do.tripled_variance, "error", on=FEW, fix=True),
    Fault("SN107", do.untracked, "warning"),
    Fault("SN107", do.untracked_with_data, "error", fix=True),
    Fault("SN108", do.keras_momentum, "warning", fix=True),
    Fault("SN109", do.cumulative_momentum, "info"),
    Fault("SN110", do.a_deviation_for_a_variance, "error", fix=True),
    Fault("SN110", do.an_inverse_for_a_variance, "error", on=FEW, fix=True),
    Fault("SN110", do.inverse_deviations_in_all_layers, "error", some=True, fix=True),
    Fault("SN110", do.all_variances_times_ten, "error", fix=True),
    Fault("SN111", do.no_eps, "warning"),
    Fault("SN111", do.large_eps, "info"),
    Fault("SN112", do.on_the_meta_device, "error"),
    Fault("SN112", do.empty_memory, "error", fix=True),
    Fault("SN113", do.made_under_inference_mode, "error", fix=True),
    Fault("SN115", do.few_updates, "error", fix=True),
    Fault("SN115", do.few_updates_of_all_layers, "error", on=FEW, some=True, fix=True),
    Fault("SN401", do.half_precision_statistics, "warning", fix=True),
    Fault("SN401", do.in_bfloat16, "warning", fix=True),
)


@pytest.mark.parametrize("name", MODELS)
def test_before_it_nothing_is_found(name: str) -> None:
    it = subject(name)
    assert found(check(it.model)) == {}
    report = check(it.model, it.batches(), forward=it.forward)
    assert found(report) == {}
    assert report.verdict is not None
    assert report.verdict.choice == "train"


@grid(FAULTS)
def test_a_fault_is_found_at_its_own_layer(fault: Fault, name: str) -> None:
    assert_found(fault, name)


@repairs(FAULTS)
def test_its_fix_makes_it_go_away(fault: Fault) -> None:
    assert_repaired(fault)
