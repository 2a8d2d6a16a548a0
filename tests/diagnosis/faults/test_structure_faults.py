"""Faults of the network: layers that are shared, misplaced, left behind."""

from __future__ import annotations

from diagnosis.faults.grid import FEW, IMAGES, Fault, assert_found, assert_repaired, grid, repairs
from diagnosis.faults.injections import structure as do

FAULTS = (
    Fault("SN114", do.unused, "info"),
    Fault("SN201", do.shared, "error", fix=True),
    Fault("SN202", do.aliased_buffers, "warning"),
    Fault("SN202", do.two_names, "info", on=FEW),
    Fault("SN203", do.norm_at_the_end, "warning"),
    Fault("SN204", do.bias_before_the_norm, "info", fix=True),
    Fault("SN205", do.dropout_before_the_convolution, "warning"),
    Fault(
        "SN206",
        do.two_samples,
        "error",
        among=True,
        beside={"SN207": "layers of 4 to 8 values"},
    ),
    Fault("SN207", do.small_batches, "warning", among=True),
    Fault("SN208", do.features_on_the_last_axis, "warning"),
    Fault("SN210", do.lazy, "info"),
    Fault("SN503", do.stripped, "error"),
    Fault("SN603", do.foreign_without_eps, "info", on=IMAGES, fix=True),
)


@grid(FAULTS)
def test_a_fault_is_found_at_its_own_layer(fault: Fault, name: str) -> None:
    assert_found(fault, name)


@repairs(FAULTS)
def test_its_fix_makes_it_go_away(fault: Fault) -> None:
    assert_repaired(fault)
