"""`stillnorm diff` promises: what changed between two files, and to run nothing that is in them."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn


@pytest.fixture
def two(project):
    """Two checkpoints that differ in two channels of one tensor, whose average does not."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    net[1].running_mean.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.save(net.state_dict(), "a.pt")
    net[1].running_mean.copy_(torch.tensor([1.0, 2.5, 2.5, 4.0]))
    torch.save({"state_dict": net.state_dict()}, "b.pt")


def test_diff_names_what_changed(run, two):
    result = run("diff", "a.pt", "b.pt")
    assert result.exit_code == 1
    assert "running_mean" in result.stdout
    assert "2 of 4" in result.stdout


def test_diff_of_equal_files_is_0(run, two):
    assert run("diff", "a.pt", "a.pt").exit_code == 0


def test_diff_as_json(run, two):
    result = run("diff", "a.pt", "b.pt", "--format", "json")
    assert result.exit_code == 1
    assert [c["tensor"] for c in json.loads(result.stdout)["changes"]] == ["running_mean"]


def test_diff_of_what_cannot_be_read(fails, two, project):
    (project / "text.pt").write_text("not a checkpoint")
    assert "nowhere.pt" in fails("diff", "a.pt", "nowhere.pt")[0]
    assert "text.pt" in fails("diff", "a.pt", "text.pt")[0]


class Evil:
    def __reduce__(self):
        return (open, ("run_by_pickle", "w"))


def test_diff_runs_nothing_in_a_file(fails, two, project):
    torch.save({"state_dict": Evil()}, "evil.pt")
    fails("diff", "a.pt", "evil.pt")
    assert not (project / "run_by_pickle").exists()
