"""Faults of what the model is fed, and of what it does with it."""

from __future__ import annotations

from diagnosis.faults.grid import IMAGES, Fault, assert_found, assert_repaired, grid, repairs
from diagnosis.faults.injections import data as do

SMALL = {"SN207": "the batches are of 8"}

FAULTS = (
    Fault("SN106", do.scaled_to_255, "error", on=IMAGES),
    Fault("SN106", do.normalised_for_another, "error", on=IMAGES[2:4]),
    Fault("SN209", do.padded, "warning", among=True),
    Fault("SN308", do.domains_in_turns, "warning", among=True, beside=SMALL),
    Fault("SN309", do.sorted_batches, "warning", among=True, beside=SMALL),
    Fault("SN310", do.answers_of_mates, "warning", beside=SMALL),
    Fault("SN402", do.infinite_sample, "error"),
    Fault("SN402", do.overflowing_weights, "error"),
    Fault("SN403", do.large_offset, "warning"),
    Fault("SN602", do.averaged_weights, "error", fix=True),
)


@grid(FAULTS)
def test_a_fault_is_found_at_its_own_layer(fault: Fault, name: str) -> None:
    assert_found(fault, name)


@repairs(FAULTS)
def test_its_fix_makes_it_go_away(fault: Fault) -> None:
    assert_repaired(fault)
