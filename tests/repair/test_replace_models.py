"""Replacing the norms of real models; all of them or none, whatever raises and wherever."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stillnorm as sn
from repair.replacing import (
    FOREIGN,
    REPLACE,
    act_net,
    around,
    exact,
    foreign,
    no_differences,
)
from stillnorm.errors import StateError
from stillnorm.holding import hold as hold_room
from stillnorm.repair import replace
from stillnorm.repair.affine import scale_and_shift
from stillnorm.repair.kinds import KINDS
from support import layers, zoo
from support.fingerprint import Fingerprint
from support.layers import conv_input, conv_net, settle
from support.tolerances import CLOSE
from support.zoo import timm, torchvision, transformers

# ------------------------------------------------------------------ real models


SMALL = {"resnet18": "torchvision/resnet18", "regnet": "timm/regnety_002", "dla": "timm/dla46_c"}
CLASSES = {"sync": "SyncBatchNorm", "affine": "AffineNorm", "frozen": "FrozenBatchNorm"}


@pytest.mark.parametrize("name", [*SMALL.values(), "timm/tf_efficientnet_lite0", "timm/rexnet_100"])
@pytest.mark.parametrize("kind", ["sync", "affine", "frozen"])
def test_real_models(name: str, kind: str) -> None:
    """In float64, where the roundings of fifty layers do not add up to anything."""
    net, x = zoo.make(name).double(), zoo.images(2).double()
    want, total = exact(net, x), len(sn.inspect(net).layers)
    before = Fingerprint(net, versions=False)
    report = replace(net, kind)
    assert (len(report.replaced), report.refused) == (total, ())
    assert all(CLASSES[kind] in one.after for one in report.replaced)
    y = net(x)
    scale = float(want.detach().abs().max())
    torch.testing.assert_close(y, want, rtol=0, atol=0 if kind == "sync" else 1e-11 * scale)
    if kind != "affine":
        back = replace(net, "batch")
        assert torch.equal(net(x), want)
        back.undo()
    report.undo()
    no_differences(net, before)
    assert torch.equal(net(x), want)


@pytest.mark.parametrize("kind", ["group", "layer"])
def test_real_models_train_with_other_norms(kind: str) -> None:
    net, x = zoo.make("timm/tf_efficientnet_lite0"), zoo.images(2)
    names = [name for name, _ in net.named_parameters()]
    parameters = list(net.parameters())
    replace(net, kind)
    assert [name for name, _ in net.named_parameters()] == names
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    net.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in parameters)


def test_detrs_frozen_backbone_keeps_its_hard_coded_eps() -> None:
    """Their converter ignores the eps of the layer that it replaces; the forward has its own."""
    net, x = zoo.make("torchvision/resnet18"), zoo.images(2)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    with torch.no_grad():
        transformers.models.detr.modeling_detr.replace_batch_norm(net)
    want = net(x)
    report = replace(net, "batch")
    assert len(report.replaced) == 20
    assert {m.eps for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    torch.testing.assert_close(
        net.train()(x), want, rtol=1e-4, atol=1e-5 * float(want.detach().abs().max())
    )
    assert sn.is_frozen(net)


def test_models_of_one_and_three_dimensions() -> None:
    video = torchvision.models.video.r3d_18(num_classes=4)
    sound = nn.Sequential(
        nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8)
    )
    for net, shape in ((video, (1, 3, 4, 16, 16)), (sound, (3, 2, 10))):
        settle(net.eval())
        x = torch.randn(shape)
        want, kinds = net(x), [type(m) for m in net.modules()]
        replace(net, "sync")
        assert torch.equal(net(x), want)
        assert replace(net, "batch").refused == ()
        assert torch.equal(net(x), want)
        assert [type(m) for m in net.modules()] == kinds
        report = replace(net, "affine")
        torch.testing.assert_close(
            net(x), want, rtol=1e-3, atol=1e-4 * float(want.detach().abs().max())
        )
        report.undo()
        replace(net, "group")
        assert net(x).shape == want.shape


# ------------------------------------------------------------------ all or nothing


ROOM = Path(REPLACE.__file__).parent
FILES = {str(ROOM / f"{name}.py") for name in ("replace", "kinds", "affine", "surgery", "calls")}
FILES |= {hold_room.__globals__["__file__"]}


class Interruption:
    """Raises when the n-th line of the files is reached; counts them without n."""

    def __init__(self, n: int | None, kind: type[BaseException]) -> None:
        self.n, self.kind, self.count = n, kind, 0

    def __enter__(self) -> Interruption:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        inside = code.co_filename in FILES and code.co_name != "__exit__"
        return self._line if inside else None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        over = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
        if event == "line" and not over.startswith("with Surgery"):  # left: all is done
            self.count += 1
            if self.count == self.n:
                sys.settrace(None)
                raise self.kind("step")
        return self._line


def tiny(kind: str) -> nn.Module:
    norm = layers.make("2d")
    net = nn.Sequential(norm, layers.timm_norm_act(), nn.Sequential(norm)).train()
    settle(net)
    norm.register_forward_hook(print)
    if kind == "batch":
        replace(net, "frozen")
        replace(net[1:], "batch")
        replace(net, "sync", "1")
    if kind == "affine":
        sn.freeze(net[:1])
    return net


@pytest.mark.parametrize("kind", ["sync", "batch", "frozen", "affine", "group", "callable"])
def test_an_interruption_at_any_line_leaves_no_trace(kind: str) -> None:
    make: Any = (lambda norm: nn.Identity()) if kind == "callable" else kind
    net = tiny(kind)
    before, modules = Fingerprint(net), list(net.modules())
    with Interruption(None, ValueError) as steps:
        report = replace(net, make)
    assert len(report.replaced) >= 1
    report.undo()
    assert steps.count > 100
    for n in range(1, steps.count + 1):
        error = KeyboardInterrupt if n % 2 else ValueError
        with pytest.raises(error, match="step"), Interruption(n, error):
            replace(net, make)
        assert not Fingerprint(net).differences(before), n
        assert torch.is_grad_enabled(), n
        assert list(net.modules()) == modules


@pytest.mark.parametrize("kind", [*KINDS])
def test_undo_is_exact(kind: str) -> None:
    net = nn.Sequential(
        conv_net(), act_net(), nn.SyncBatchNorm(4), *(foreign(name)[0] for name in FOREIGN)
    )
    before, modules = Fingerprint(net), list(net.modules())
    report = replace(net, kind)
    report.undo()
    assert not Fingerprint(net).differences(before)
    assert list(net.modules()) == modules
    report.undo()
    assert list(net.modules()) == modules


def test_a_model_wrapped_for_distributed_training_is_refused() -> None:
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.module = conv_net()

    with pytest.raises(StateError, match="wrapped for distributed training"):
        replace(Wrapped(), "sync")


def test_verification_notices_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The near miss: the smallest eps that anybody uses in place of the layer's."""
    kinds = sys.modules["stillnorm.repair.kinds"]
    net = around(layers.make("eps=0.3"))
    before = Fingerprint(net)
    monkeypatch.setattr(
        kinds, "scale_and_shift", lambda *args: scale_and_shift(*args[:-1], args[-1] + 1e-5)
    )
    with pytest.raises(StateError, match="0: AffineNorm in its place"):
        replace(net, "affine")
    assert not Fingerprint(net).differences(before)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(list(CLOSE)),
    spread=st.sampled_from([1e-6, 1e-3, 1.0, 1e2]),
    eps=st.sampled_from([1e-5, 1e-3]),
    act=st.sampled_from([None, nn.SiLU, nn.Hardswish, nn.GELU, nn.Sigmoid]),
    kinds=st.sampled_from([("affine",), ("frozen", "batch"), ("frozen", "affine"), ("sync",)]),
)
def test_verification_raises_no_false_alarm(
    seed: int,
    dtype: torch.dtype,
    spread: float,
    eps: float,
    act: type[nn.Module] | None,
    kinds: tuple[str, ...],
) -> None:
    """Also where variances underflow and half precision rounds every step of theirs."""
    layer = (
        nn.BatchNorm2d(6, eps=eps)
        if act is None
        else timm.layers.BatchNormAct2d(6, eps=eps, act_layer=act)
    )
    net = around(settle(layer, seed).to(dtype))
    with torch.no_grad():
        layer.running_var.mul_(spread)
        layer.running_mean.mul_(min(1.0, spread))
        layer.running_var[0] = 0
    for kind in kinds:
        assert len(replace(net, kind).replaced) == 1


def test_an_eps_that_their_float16_rounds_to_zero_is_noticed() -> None:
    """torchvision's layer adds eps in the dtype of its buffers: 1 / sqrt(0 + 1e-8) is infinite."""
    layer = nn.BatchNorm2d(4, eps=1e-8)
    layer.running_var[0] = 0
    net = around(layer.half())
    with pytest.raises(StateError, match="FrozenBatchNorm2d in its place"):
        replace(net, "frozen")
    assert net[0] is layer


def test_broken_statistics_are_broken_as_before() -> None:
    net, x = conv_net(), conv_input()
    net[1].running_mean[0] = torch.nan
    net[1].running_var[1] = torch.inf
    net[1].running_var[2] = -1.0
    want = exact(net, x)
    for kind in ("sync", "frozen", "affine"):
        report = replace(net, kind)
        assert torch.equal(exact(net, x).isnan(), want.isnan())
        report.undo()
