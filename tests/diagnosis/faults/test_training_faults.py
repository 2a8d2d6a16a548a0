"""Faults of the training step and its optimizer."""

from __future__ import annotations

from diagnosis.faults.grid import ALL, FEW, Fault, assert_found, assert_repaired, grid, repairs
from diagnosis.faults.injections import training as do

# hardsigmoid has no second derivative.
TWICE = tuple(name for name in ALL if name != "timm/lcnet_050")

FAULTS = (
    Fault("SN001", do.frozen_backbone, "error", fix=True),
    Fault("SN005", do.left_in_eval, "warning"),
    Fault("SN301", do.checkpointing, "warning"),
    Fault("SN301", do.checkpointing_reentrant, "warning", on=FEW),
    Fault("SN302", do.sharpness_aware, "warning"),
    Fault("SN302", do.attacked, "warning", on=FEW),
    Fault("SN303", do.stale_gradient, "error", fix=True),
    Fault("SN304", do.replaced_after_the_optimizer, "warning"),
    Fault("SN305", do.decayed, "info"),
    Fault("SN306", do.validation_inside, "error"),
    Fault("SN307", do.micro_batches, "info"),
    Fault("SN311", do.gradient_penalty, "warning", on=TWICE),
)


@grid(FAULTS)
def test_a_fault_is_found_at_its_own_layer(fault: Fault, name: str) -> None:
    assert_found(fault, name)


@repairs(FAULTS)
def test_its_fix_makes_it_go_away(fault: Fault) -> None:
    assert_repaired(fault)
