"""Faults in checkpoints and exported programs."""

from __future__ import annotations

from pathlib import Path

from diagnosis.faults.grid import FEW, Fault, assert_found, grid
from diagnosis.faults.injections import files as do

FAULTS = (
    Fault("SN601", do.without_statistics, "error"),
    Fault("SN601", do.without_one_variance, "error"),
    Fault("SN102", do.saved_with_nan, "error"),
    Fault("SN103", do.saved_with_negative_variance, "error"),
    Fault("SN112", do.saved_as_memory_was, "error"),
    Fault("SN401", do.saved_in_half_precision, "warning"),
    Fault("SN701", do.exported_in_train_mode, "error", on=FEW),
    Fault("SN701", do.exported_with_one_layer_in_train_mode, "error"),
)


@grid(FAULTS)
def test_a_fault_is_found_at_its_own_layer(fault: Fault, name: str, tmp_path: Path) -> None:
    assert_found(fault, name, tmp_path)
