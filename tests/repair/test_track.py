"""Layers without statistics get their own: eval no longer depends on the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stillnorm as sn
from calibration.received import assert_exact, recording
from stillnorm import track_statistics
from stillnorm.errors import BatchError, CalibrationError, StateError
from stillnorm.repair import surgery, track
from support.fingerprint import Fingerprint
from support.interruptions import Interruption
from support.layers import conv_input, conv_net
from support.zoo import images, make, timm


def net() -> nn.Module:
    """Three norms: one tracks, one never did, one was switched off."""
    made = conv_net()
    made[3][1] = nn.BatchNorm2d(6, track_running_stats=False)
    made[6].track_running_stats = False
    return made


def data() -> list[Tensor]:
    return [conv_input(n, seed=n) for n in (6, 4, 5)]


def test_eval_depends_on_the_batch_no_more() -> None:
    made, x = net(), conv_input(8)
    alone = made.eval()(x[:2])
    assert (made(x)[:2] - alone).abs().max() > 0.01, "the near miss: it did"
    report = track_statistics(made, data())
    assert report.tracked == ("3.1", "6")
    assert report.refused == ()
    torch.testing.assert_close(made.eval()(x)[:2], made(x[:2]))
    assert "SN107" not in [finding.code for finding in sn.check(made, x).findings]


def test_the_statistics_are_those_of_the_data() -> None:
    made = net()
    kept = {k: v.clone() for k, v in made[1].state_dict().items()}
    with recording(made) as received:
        track_statistics(made, data())
    assert all(torch.equal(v, kept[k]) for k, v in made[1].state_dict().items())
    assert_exact({layer: received[layer] for layer in (made[3][1], made[6])})


def test_it_is_as_a_layer_made_so_and_trains_on() -> None:
    made = net()
    track_statistics(made, data())
    layer, new = made[3][1], nn.BatchNorm2d(6)
    assert list(layer.state_dict()) == list(new.state_dict())
    assert layer.track_running_stats
    before = layer.running_mean.clone()
    made.train()(conv_input(8))
    assert not torch.equal(layer.running_mean, before)
    assert int(layer.num_batches_tracked) == 4
    assert {k: v.dtype for k, v in layer.state_dict().items()} == {
        k: v.dtype for k, v in new.state_dict().items()
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_statistics_have_the_dtype_of_the_layer(dtype: torch.dtype) -> None:
    made = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    ).to(dtype)
    track_statistics(made, [x.to(dtype) for x in data()])
    assert made[1].running_mean.dtype == dtype
    assert made.eval()(conv_input(1).to(dtype)).dtype == dtype


def test_a_root_and_a_subclass_with_its_own_forward() -> None:
    root = nn.BatchNorm2d(3, track_running_stats=False)
    assert track_statistics(root, data()).tracked == ("",)
    act = nn.Sequential(timm.layers.BatchNormAct2d(3, track_running_stats=False))
    track_statistics(act, data())
    x = conv_input(8)
    torch.testing.assert_close(act.eval()(x)[:1], act(x[:1]))


def test_a_real_network_switched_off_in_a_loop() -> None:
    made = make("torchvision/resnet18")
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = None
    x = images(8)
    report = track_statistics(made, [x, images(8, seed=1)])
    assert len(report.tracked) == 20
    torch.testing.assert_close(made.eval()(x)[:1], made(x[:1]), rtol=1e-3, atol=1e-4)


def test_what_is_refused_and_what_is_not_meant() -> None:
    made = nn.ModuleDict(
        {
            "instance": nn.InstanceNorm2d(3),
            "batch": nn.BatchNorm2d(3),
            "lost": nn.BatchNorm2d(3, track_running_stats=False),
            "bare": nn.BatchNorm2d(3, track_running_stats=False),
        }
    )
    before = Fingerprint(made["lost"])
    report = track_statistics(
        made, data(), forward=lambda net, x: net["bare"](net["batch"](net["instance"](x)))
    )
    assert report.tracked == ("bare",)
    assert dict(report.refused) == {
        "instance": "is an instance norm: it normalises by the sample in both modes",
        "lost": "no batch reached it",
    }
    assert not Fingerprint(made["lost"]).differences(before)
    assert "no batch reached it" in str(report)
    assert report.to_json()


def test_nothing_to_do() -> None:
    made = conv_net()
    before = Fingerprint(made)
    report = track_statistics(made, data())
    assert report.tracked == report.refused == ()
    assert not Fingerprint(made).differences(before)


def test_undo() -> None:
    made = net()
    before = Fingerprint(made, versions=False)
    report = track_statistics(made, data())
    report.undo()
    differences = Fingerprint(made, versions=False).differences(before)
    assert not differences
    assert made[3][1].running_mean is None


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize(
    ("where", "name", "nth"),
    [
        (track, "_equip", 1),
        (track, "_equip", 2),
        (track, "recalibrate", 1),
        (surgery.Surgery, "set_attribute", 1),
        (surgery.Surgery, "set_buffer", 1),
        (surgery.Surgery, "set_buffer", 3),
        (track.TrackReport, "__init__", 1),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_an_error_at_any_step_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], where: Any, name: str, nth: int
) -> None:
    made = net()
    before = Fingerprint(made, versions=False)
    interruption = Interruption(monkeypatch, where, name, nth, kind)
    with pytest.raises(kind):
        track_statistics(made, data())
    monkeypatch.undo()
    assert interruption.calls >= nth
    assert not Fingerprint(made, versions=False).differences(before)


def test_bad_data_leaves_no_trace() -> None:
    for bad, kind in (
        ([], CalibrationError),
        ([data()[0] * float("nan")], CalibrationError),
        (iter([data()[0].repeat(1, 2, 1, 1)]), BatchError),
    ):
        made = net()
        before = Fingerprint(made, versions=False)
        with pytest.raises(kind):
            track_statistics(made, bad)
        assert not Fingerprint(made, versions=False).differences(before)


def test_lazy_models_are_refused_as_everywhere() -> None:
    made = nn.Sequential(nn.LazyBatchNorm2d(), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(StateError, match="LazyBatchNorm2d"):
        track_statistics(made, data())
    assert made[1].running_mean is None


def test_norms_that_the_models_own_train_keeps_in_eval() -> None:
    class NormEval(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.BatchNorm2d(3, track_running_stats=False)
            self.b = nn.BatchNorm2d(3, track_running_stats=False)

        def train(self, mode: bool = True) -> nn.Module:
            super().train(mode)
            self.a.training = self.b.training = False
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(8 * x + 60))

    made, x = NormEval().train(), torch.cat(data())
    want = made(x)
    track_statistics(made, x)
    torch.testing.assert_close(made(x), want, rtol=0.02, atol=0.02)


def test_statistics_are_never_integers() -> None:
    made = nn.Sequential(nn.BatchNorm2d(3, affine=False, track_running_stats=False))
    made.register_parameter("quantised", nn.Parameter(torch.zeros(2, dtype=torch.int8), False))
    track_statistics(made, data())
    assert made[0].running_var.dtype == torch.float32
