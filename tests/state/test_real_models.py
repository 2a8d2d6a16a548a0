"""The README's lines on architectures that nobody here wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import stillnorm as sn
from stillnorm.errors import VerifyError
from stillnorm.state import diff_states, read_state
from support import zoo

NAMES = [
    "torchvision/mobilenet_v3_small",
    "timm/efficientnet_lite0",
    "timm/dla46_c",
    "transformers/resnet",
]


@pytest.mark.parametrize("name", NAMES)
def test_freeze_snapshot_train_verify(name: str, tmp_path: Path) -> None:
    model = zoo.make(name)
    sn.freeze(model)
    before = sn.snapshot(model)
    torch.save(model.state_dict(), tmp_path / "before.pt")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    model.train()
    for seed in range(2):
        model(zoo.images(4, seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    before.verify(model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "after.ckpt")
    difference = diff_states(
        read_state(tmp_path / "before.pt"), read_state(tmp_path / "after.ckpt")
    )
    assert not difference
    assert difference.layers == len(before.layers)
    assert difference.others is not None
    assert difference.others.changed > 0

    sn.unfreeze(model)
    model.train()(zoo.images(4))
    with pytest.raises(VerifyError, match="its hold is gone"):
        before.verify(model)
    assert len(before.diff(model).changes) >= 3 * len(before.layers)
    before.restore(model)
    before.verify(model)
