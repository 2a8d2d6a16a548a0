"""`fold`: both directions, every kind of layer, the border, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import stillnorm as sn
from stillnorm.errors import StateError
from support import layers, zoo
from support.fingerprint import Fingerprint

DTYPE = torch.float64


def settled(*modules: nn.Module, seed: int = 1) -> nn.Sequential:
    return layers.settle(nn.Sequential(*modules), seed).to(DTYPE).eval()  # type: ignore[return-value]


def agrees(model: nn.Module, x: Tensor, folded: tuple[str, ...]) -> sn.FoldReport:  # type: ignore[name-defined]
    """The folded model computes the same on the example and on another input."""
    before = Fingerprint(model)
    report = sn.fold(model, x)
    assert Fingerprint(model).differences(before) == []
    assert report.folded == folded
    g = torch.Generator().manual_seed(8)
    for given_ in (x, torch.randn(x.shape, generator=g, dtype=x.dtype)):
        torch.testing.assert_close(report.model(given_), model(given_), rtol=1e-9, atol=1e-11)
    return report


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@settings(max_examples=300)
@given(
    rank=st.integers(1, 3),
    transposed=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    padding=st.integers(0, 2),
    mode=st.sampled_from(["zeros", "reflect", "circular", "replicate"]),
    bias=st.booleans(),
    affine=st.booleans(),
    side=st.sampled_from(["before", "after", "both"]),
    seed=st.integers(0, 100),
)
def test_every_convolution(
    rank: int, transposed: bool, groups: int, kernel: int, stride: int, dilation: int,
    padding: int, mode: str, bias: bool, affine: bool, side: str, seed: int,
) -> None:  # fmt: skip
    """Exact at the border, whatever pads it; against plain torch in float64."""
    torch.manual_seed(seed)
    settings_: dict[str, Any] = {
        "stride": stride, "dilation": dilation, "padding": padding, "groups": groups, "bias": bias,
    }  # fmt: skip
    if transposed:
        settings_["output_padding"] = min(1, stride - 1)
        conv = TRANSPOSED[rank](4, 8, kernel, **settings_)
    else:
        conv = CONV[rank](4, 8, kernel, padding_mode=mode, **settings_)
    first = [NORM[rank](4, affine=affine)] if side != "after" else []
    last = [NORM[rank](8, affine=affine)] if side != "before" else []
    model = settled(*first, conv, *last, seed=seed)
    x = torch.randn(2, 4, *[6] * rank, dtype=DTYPE)
    names = {"before": ("0",), "after": ("1",), "both": ("0", "2")}[side]
    if mode != "zeros" and not transposed:
        names = tuple(set(names) - {"0"})  # the layer pads by a function of its own
    agrees(model, x, names)


@pytest.mark.parametrize("side", ["before", "after", "both"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_layers(side: str, bias: bool) -> None:
    first = [nn.BatchNorm1d(4)] if side != "after" else []
    last = [nn.BatchNorm1d(5)] if side != "before" else []
    model = settled(*first, nn.Linear(4, 5, bias), *last)
    names = {"before": ("0",), "after": ("1",), "both": ("0", "2")}[side]
    agrees(model, torch.randn(3, 4, dtype=DTYPE), names)


@pytest.mark.parametrize(
    "name", [n for n in layers.CASES if layers.CASES[n].shape[1:] == (4, 5, 6)]
)
def test_every_norm(name: str) -> None:
    """It folds, or it is refused with the reason; the output is right either way."""
    norm = layers.make(name)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm).to(DTYPE).eval()
    x = torch.randn(2, 3, 5, 6, dtype=DTYPE)
    report = sn.fold(model, x)
    torch.testing.assert_close(report.model(x), model(x), rtol=1e-9, atol=1e-11)
    plain = name in ("2d", "sync", "affine=False", "momentum=None", "momentum=0", "eps=0.3", "lazy",
                     "instance2d", "subclass", "timm BatchNormAct2d", "own train()",
                     "own sticky train()", "own __getstate__", "bias=False")  # fmt: skip
    assert bool(report.folded) is plain, report.refused
    if not plain:
        assert "does more than normalise" in dict(report.refused)["1"]


@pytest.mark.parametrize("library", ["torchvision", "timm", "transformers"])
def test_frozen_layers_of_others(library: str) -> None:
    if library == "torchvision":
        frozen: nn.Module = zoo.torchvision.ops.FrozenBatchNorm2d(4)
    elif library == "timm":
        frozen = zoo.timm.layers.norm_act.FrozenBatchNormAct2d(4)
    else:
        from transformers.models.detr.modeling_detr import DetrFrozenBatchNorm2d

        frozen = DetrFrozenBatchNorm2d(4)
    plain = layers.settle(nn.BatchNorm2d(4))
    frozen.load_state_dict({k: v for k, v in plain.state_dict().items() if "num" not in k})
    model = nn.Sequential(nn.Conv2d(3, 4, 1), frozen).to(DTYPE).eval()
    agrees(model, torch.randn(2, 3, 5, 6, dtype=DTYPE), ("1",))


def test_held_and_folding_models_fold_and_come_out_plain() -> None:
    x = layers.conv_input()
    model = layers.conv_net().eval()
    expected = model(x)
    sn.freeze(model, fold_on=x, fold_when="always")
    report = sn.fold(model.train(), x)
    assert report.folded == ("1", "3.1", "6")
    torch.testing.assert_close(report.model(x), expected)
    assert {type(m).__module__.split(".")[0] for m in report.model.modules()} == {"torch"}
    part = layers.conv_net()
    sn.freeze(part)
    part[0].register_forward_hook(lambda *given_: None)
    assert type(sn.fold(part, x).model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("kind", ["parametrized", "old weight_norm"])
def test_computed_weights_are_baked(kind: str) -> None:
    model = layers.conv_net().to(DTYPE).eval()
    if kind == "parametrized":
        parametrizations.weight_norm(model[0])
    else:
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(model[0])
        with torch.no_grad():  # torch cannot copy what this kind computes with gradients
            model[0](torch.randn(1, 3, 3, 3, dtype=DTYPE))
    x = layers.conv_input().to(DTYPE)
    report = sn.fold(model, x)
    assert report.folded == ("1", "3.1", "6")
    assert type(report.model[0]) is nn.Conv2d
    torch.testing.assert_close(report.model(x), model(x), rtol=1e-9, atol=1e-11)


class SamePadding(nn.Conv2d):
    """Pads in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1))
        return F.conv2d(input=x, weight=self.weight, bias=self.bias, stride=self.stride)


class Standardised(nn.Conv2d):
    """Computes its weight in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.bias)


class Biasless(nn.Conv2d):
    """Never uses its bias."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


def test_forwards_of_users() -> None:
    x = torch.randn(2, 3, 6, 6, dtype=DTYPE)
    agrees(settled(SamePadding(3, 4, 2), nn.BatchNorm2d(4)), x, ("1",))
    report = agrees(settled(Standardised(3, 4, 2), nn.BatchNorm2d(4)), x, ())
    assert "computes its weight" in dict(report.refused)["1"]
    report = agrees(settled(Biasless(3, 4, 2, bias=False), nn.BatchNorm2d(4)), x, ())
    assert "does not use the weight or bias" in dict(report.refused)["1"]


class Net(nn.Module):
    def __init__(self, run: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.norm, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.run = run
        layers.settle(self).to(DTYPE).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)  # type: ignore[no-any-return]


def _tied(m: Net) -> None:
    m.other.weight = m.conv.weight


GRAPHS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "two convolutions": (lambda m, x: m.norm(m.conv(x)) + m.norm(m.other(x)), ("norm",)),
    "a pair used twice": (lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(x + 1)), ("norm",)),
    "one convolution before two norms": (lambda m, x: m.norm(m.conv(x)) + m.second(m.conv(x)), ()),
    "one output, two norms": (lambda m, x: (lambda z: m.norm(z) + m.second(z))(m.conv(x)), ()),
    "a second consumer": (lambda m, x: (lambda z: m.norm(z) + z)(m.conv(x)), ()),
    "relu between": (lambda m, x: m.norm(m.conv(x).relu()), ()),
    "relu in place": (lambda m, x: m.norm(m.conv(x).relu_()), ()),
    "not always behind it": (lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(x) + 1), ()),
    "returned too": (lambda m, x: torch.cat([m.norm(z := m.conv(x)), z]), ()),
    "the weight used elsewhere": (
        lambda m, x: m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight), ()
    ),
    "by keyword": (lambda m, x: m.norm(input=m.conv(input=x)), ("norm",)),
    "never called": (lambda m, x: m.conv(x), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
@torch.no_grad()
def test_graphs(name: str) -> None:
    run, folded = GRAPHS[name]
    model = Net(run)
    report = agrees(model, torch.randn(2, 3, 5, 5, dtype=DTYPE), folded)
    assert all(reason for _, reason in report.refused)
    assert {p for p, _ in report.refused} == {"norm", "second"} - set(folded)


def test_tied_weights_are_parted() -> None:
    model = Net(lambda m, x: m.norm(m.conv(x)) + m.other(x))
    model.other.weight = model.conv.weight
    agrees(model, torch.randn(2, 3, 5, 5, dtype=DTYPE), ("norm",))


def test_control_flow_that_no_symbolic_trace_survives() -> None:
    def run(m: Net, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x))
        return m.second(m.other(x)) if float(y.sum()) > 1e9 else y

    report = agrees(Net(run), torch.randn(2, 3, 5, 5, dtype=DTYPE), ("norm",))
    assert dict(report.refused)["second"] == "the example does not reach it"


def test_linear_on_sequences_is_refused() -> None:
    """Where the norm's channels are not the linear layer's, equal sizes or not."""
    for length in (4, 5):
        model = settled(nn.Linear(3, 4), nn.BatchNorm1d(length))
        agrees(model, torch.randn(2, length, 3, dtype=DTYPE), ())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_are_measured_and_within_the_bound(dtype: torch.dtype) -> None:
    model = layers.conv_net().to(dtype).eval()
    report = sn.fold(model, layers.conv_input().to(dtype))
    for path in report.folded:
        error = report.errors[path]
        assert error.dtype == dtype
        assert 0 < error.folded <= error.bound


def test_what_would_overflow_is_refused() -> None:
    model = layers.conv_net().half().eval()
    with torch.no_grad():
        model[1].running_var.fill_(0)
        model[1].weight.fill_(6e4)
    report = sn.fold(model, layers.conv_input().half())
    assert "off by nan" in dict(report.refused)["1"]


def test_the_result_needs_no_stillnorm(tmp_path: Path) -> None:
    """It unpickles in a process that cannot import it, the exact border included."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    model = layers.settle(model).eval()
    x = torch.randn(2, 3, 6, 6)
    folded = sn.fold(model, x).model
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(folded))
    torch.save((x, model(x)), tmp_path / "values.pt")
    code = (
        "import sys, pickle, torch; sys.modules['stillnorm'] = None\n"
        "model = pickle.load(open('model.pickle', 'rb'))\n"
        "x, y = torch.load('values.pt')\n"
        "torch.testing.assert_close(model(x), y)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_the_result_exports_compiles_and_copies() -> None:
    model = layers.settle(
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
    ).eval()
    x = torch.randn(2, 3, 6, 6)
    folded, expected = sn.fold(model, x).model, model(x)
    torch.testing.assert_close(torch.export.export(folded, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.jit.trace(folded, x)(x), expected)
    torch.testing.assert_close(torch.jit.script(folded)(x), expected)
    torch.testing.assert_close(torch.compile(folded, backend="aot_eager")(x), expected)
    torch.testing.assert_close(copy.deepcopy(folded)(x), expected)
    larger = torch.randn(1, 3, 9, 7)
    torch.testing.assert_close(folded(larger), model(larger))


def test_layout_is_kept() -> None:
    model = layers.conv_net().to(memory_format=torch.channels_last).eval()
    folded = sn.fold(model, layers.conv_input()).model
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_compiled_and_wrapped_models() -> None:
    x = layers.conv_input()
    model = layers.conv_net().eval()
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        report = sn.fold(wrapped, x)
        assert report.folded == ("1", "3.1", "6")
        torch.testing.assert_close(report.model(x), model(x))


class NoEps(nn.Module):
    """As the first copies of a frozen layer: no attribute eps, and 1e-5 in the forward."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        s = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * s.view(1, -1, 1, 1) + (self.bias - self.running_mean * s).view(1, -1, 1, 1)


NoEps.__name__ = "FrozenBatchNorm2d"


class FrozenRelu(zoo.torchvision.ops.FrozenBatchNorm2d):  # type: ignore[misc]
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ConvAct(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / self.weight.abs().mean())


def _listed(m: Net) -> Net:
    m.alias = [m.norm]  # type: ignore[assignment]
    return m


def _scripted_second_use() -> Net:
    def relu(z: Tensor) -> Tensor:
        return z.relu()

    scripted = torch.jit.script(relu)
    return Net(lambda m, x: (lambda z: m.norm(z) + scripted(z))(m.conv(x)))


DISGUISED: dict[str, Any] = {
    "a frozen layer with an eps of its own": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), NoEps(4)),
    "a frozen layer that does more": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), FrozenRelu(4)),
    "a convolution that does more": lambda: settled(nn.BatchNorm2d(3), ConvAct(3, 4, 3, padding=1)),
    "a weight read twice": lambda: settled(Scaled(3, 4, 1), nn.BatchNorm2d(4)),
    "a scripted second use": _scripted_second_use,
    "an alias in a list": lambda: _listed(Net(lambda m, x: m.alias[0](m.conv(x)))),
    "an attribute of the norm": lambda: Net(lambda m, x: m.norm(m.conv(x)) * m.norm.eps),
    "the class of its output": lambda: Net(lambda m, x: m.norm(m.conv(x)).argmax(1)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DISGUISED)
@torch.no_grad()
def test_what_no_trace_shows_is_found_in_float64(name: str, dtype: torch.dtype) -> None:
    """The one that cannot fold is refused, whatever the dtype; nothing raises."""
    torch.manual_seed(4)
    model = DISGUISED[name]().to(dtype).eval()
    x = torch.randn(2, 3, 5, 5).to(dtype)
    before = Fingerprint(model)
    report = sn.fold(model, x)
    assert Fingerprint(model).differences(before) == []
    y, expected = report.model(x), model(x)
    if y.is_floating_point():
        error = (y.double() - expected.double()).abs().max() / expected.double().abs().max()
        assert float(error) < 40 * torch.finfo(dtype).eps
    if name != "the class of its output":
        assert report.folded == ()


def test_the_one_that_is_wrong_is_refused_and_the_others_fold() -> None:
    model = settled(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), Scaled(4, 4, 1), nn.BatchNorm2d(4)
    )
    report = agrees(model, torch.randn(2, 3, 5, 5, dtype=DTYPE), ("1",))
    assert "computes something else" in dict(report.refused)["4"]


def test_geometry_that_depends_on_the_input_is_refused() -> None:
    class Depends(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, self.bias, padding=x.shape[-1] % 2)

    model = settled(nn.BatchNorm2d(3), Depends(3, 4, 3))
    report = sn.fold(model, torch.randn(2, 3, 8, 8, dtype=DTYPE))
    assert "forward of its own" in dict(report.refused)["0"]


def test_hooks_are_not_lost_with_a_computed_weight() -> None:
    model = layers.conv_net().to(DTYPE).eval()
    parametrizations.weight_norm(model[0])
    model[0].register_forward_pre_hook(lambda module, args: args[0].clamp(max=10.0))
    x = layers.conv_input().to(DTYPE)
    report = sn.fold(model, x)
    assert "would be lost" in dict(report.refused)["1"]
    torch.testing.assert_close(report.model(100 * x), model(100 * x), rtol=1e-9, atol=1e-9)


def test_an_input_written_between_norm_and_convolution_is_refused() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            h = x.clone()
            n = self.norm(h)
            h.relu_()
            return self.conv(n) + h.sum()

    model = layers.settle(Writes()).to(DTYPE).eval()
    report = agrees(model, torch.rand(2, 3, 5, 5, dtype=DTYPE), ())
    assert "is written before the layer after it" in dict(report.refused)["norm"]


def test_a_model_that_does_not_run_in_float64_is_said_to_be_judged_in_parts() -> None:
    model = Net(lambda m, x: m.norm(m.conv(x.float()))).float()
    report = sn.fold(model, torch.randn(2, 3, 5, 5))
    assert (report.folded, report.judged_whole) == (("norm",), False)
    assert "not compared in float64" in str(report)
    assert sn.fold(layers.conv_net(), layers.conv_input()).judged_whole


def test_an_empty_batch() -> None:
    model = settled(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))
    x = torch.randn(2, 3, 5, 5, dtype=DTYPE)
    folded = sn.fold(model, x).model
    assert folded(x[:0]).shape == model(x[:0]).shape


def test_the_example_is_not_written_to() -> None:
    model = Net(lambda m, x: m.norm(m.conv(x.div_(2))))
    x = torch.randn(2, 3, 5, 5, dtype=DTYPE)
    before = x.clone()
    with torch.no_grad():
        assert sn.fold(model, x).folded == ("norm",)
        sn.freeze(model, fold_on=x)
    assert torch.equal(x, before)


def test_what_does_not_fit_half_precision_on_both_sides_is_refused() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).half().eval()
    with torch.no_grad():
        model[0].weight.fill_(400)
        model[2].weight.fill_(400)
    assert sn.fold(model, torch.randn(2, 3, 4, 4).half()).refused


def test_models_that_cannot_be_copied_for_folding() -> None:
    x = layers.conv_input()
    wrapped = layers.conv_net().train()
    own = wrapped.forward
    wrapped.forward = lambda x: own(x)  # type: ignore[method-assign]
    before = Fingerprint(wrapped)
    with pytest.raises(StateError, match="a copy would run the original"):
        sn.fold(wrapped, x)
    assert Fingerprint(wrapped).differences(before) == []
    with pytest.raises(StateError, match="TorchScript"):
        sn.fold(torch.jit.script(layers.conv_net()), x)
    with pytest.raises(StateError, match="meta device"):
        sn.fold(layers.conv_net().to("meta"), x)


def test_models_that_add_hooks_at_their_first_forward_stay_whole() -> None:
    """transformers notes in a flag that its hooks are there."""
    import transformers

    config = transformers.SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        patch_sizes=[3, 3], strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=8,
    )  # fmt: skip
    model = layers.settle(transformers.SegformerForSemanticSegmentation(config)).eval()
    example = {"pixel_values": torch.randn(1, 3, 32, 32)}
    sn.freeze(model, fold_on=example)
    report = sn.fold(model, example)
    assert report.folded == ("decode_head.batch_norm",)
    with torch.no_grad():
        torch.testing.assert_close(report.model(**example).logits, model(**example).logits)


def test_a_model_without_norms_and_the_report() -> None:
    report = sn.fold(nn.Linear(2, 2), torch.randn(1, 2))
    assert (report.folded, report.refused, report.max_error) == ((), (), 0.0)
    report = sn.fold(Net(GRAPHS["relu between"][0]), torch.randn(2, 3, 5, 5, dtype=DTYPE))
    assert "0 norms folded, 2 not" in str(report)
    assert "relu stands" in str(report)
    assert json.loads(report.to_json())["folded"] == []
