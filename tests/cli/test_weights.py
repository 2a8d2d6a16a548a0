"""`--weights` promises: a checkpoint goes in whole or not at all, and says why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import stillnorm
from stillnorm.cli.weights import load_weights
from stillnorm.errors import FileFormatError


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def state() -> dict[str, torch.Tensor]:
    made = net()
    for tensor in made.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else torch.tensor(7))
    return {k: v.clone() for k, v in made.state_dict().items()}


def bits(model: nn.Module) -> dict[str, list[object]]:
    return {k: v.tolist() for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.ckpt", "w.bin", "w.safetensors"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_every_kind_of_file_arrives_bit_for_bit(tmp_path, name, prefix):
    saved, model = state(), net()
    prefixed = {prefix + k: v for k, v in saved.items()}
    if name.endswith(".safetensors"):
        save_file(prefixed, tmp_path / name)
    else:
        torch.save({"state_dict": prefixed, "epoch": 3}, tmp_path / name)
    load_weights(model, tmp_path / name)
    assert bits(model) == {k: v.tolist() for k, v in saved.items()}


def test_a_wrapped_model_takes_an_unwrapped_checkpoint(tmp_path):
    saved, model = state(), nn.DataParallel(net())
    torch.save(saved, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert bits(model.module) == {k: v.tolist() for k, v in saved.items()}


def test_a_checkpoint_from_before_counters(tmp_path):
    saved, model = state(), net()
    del saved["1.num_batches_tracked"]
    torch.save(saved, tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert torch.equal(model[1].running_var, saved["1.running_var"])


def refused(saved: dict[str, torch.Tensor], folder: Path) -> FileFormatError:
    """Load into a model, which must stay as it was, and return why it was refused."""
    model = net()
    before = bits(model)
    torch.save(saved, folder / "w.pt")
    with pytest.raises(FileFormatError) as caught:
        load_weights(model, folder / "w.pt")
    assert bits(model) == before
    return caught.value


def test_a_checkpoint_without_statistics_is_refused(tmp_path):
    saved = {k: v for k, v in state().items() if "running" not in k}
    error = refused(saved, tmp_path)
    assert error.fact == ("w.pt lacks 2 of the model's 7 tensors: 1.running_mean, 1.running_var")


def test_another_shape_is_refused(tmp_path):
    saved = state()
    saved["0.weight"] = torch.randn(4, 1, 1, 1)
    assert refused(saved, tmp_path).fact == (
        "0.weight is (4, 1, 1, 1) in w.pt and (4, 3, 1, 1) in the model"
    )


def test_the_same_model_under_another_name_is_told(tmp_path):
    saved = {f"encoder.{k}": v for k, v in state().items()}
    assert "it has encoder.0.weight instead" in refused(saved, tmp_path).help


def test_the_state_of_a_split_model_says_to_split_first(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(self.bn(x)))

    split = Twice()
    stillnorm.split_shared(split, torch.randn(8, 3, 4, 4), ["bn"])
    torch.save(split.state_dict(), tmp_path / "w.pt")
    with pytest.raises(FileFormatError) as caught:
        load_weights(Twice(), tmp_path / "w.pt")
    assert "lacks 4 of the model's 7 tensors: bn.weight" in caught.value.fact
    assert "bn is split" in caught.value.help
    assert "sn.split_shared(model, batches)" in caught.value.help


def test_a_pickled_model_is_called_one(tmp_path):
    torch.save(net(), tmp_path / "w.pt")
    with pytest.raises(FileFormatError, match=r"is a pickled model .*, not a state dict") as caught:
        load_weights(net(), tmp_path / "w.pt")
    assert caught.value.help.startswith("save model.state_dict() instead")


def test_what_has_no_place_is_said(tmp_path, capsys):
    torch.save(state() | {"head.weight": torch.ones(2)}, tmp_path / "w.pt")
    load_weights(net(), tmp_path / "w.pt")
    assert capsys.readouterr().err == "w.pt: 1 tensor has no place in the model: head.weight\n"


def test_the_option(run, fails, project):
    model = net()
    model[1].running_var.fill_(9.0)
    torch.save(model.state_dict(), project / "w.pt")
    assert "9 .. 9" in run("inspect", "net.py:healthy", "--weights", "w.pt").stdout
    (project / "cut.pt").write_bytes((project / "w.pt").read_bytes()[:300])
    for name, fact in (("no.pt", "no.pt cannot be read"), ("cut.pt", "cut.pt")):
        assert fact in fails("inspect", "net.py:healthy", "--weights", name)[0]
