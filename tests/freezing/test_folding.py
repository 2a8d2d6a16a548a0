"""`freeze(fold_on=)`: everything users do to a model, with norms computed in their convolutions.

The reference is always the same network in eval mode, run by plain torch.
"""

from __future__ import annotations

import copy
import io
import json
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import stillnorm as sn
from stillnorm.errors import RefusedError
from support import layers
from support.fingerprint import Fingerprint
from support.folding import AFFINE, DTYPE, Variant, agree, folded, gradients, net, skipped, x
from support.oracles import saved_bytes

# ------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize("affine", AFFINE)
def test_output_and_gradients_are_those_of_eval_mode(affine: Any) -> None:
    model, plain = net(), net().eval()
    folded(model, affine=affine)
    agree(gradients(model), gradients(plain), affine)


@pytest.mark.parametrize("affine", AFFINE)
def test_it_folds_and_is_not_computed_twice(affine: Any) -> None:
    """The norms make no batch_norm call, and every convolution runs once."""
    model = folded(net(), affine=affine)
    with torch.profiler.profile() as profile:
        model(x())
    calls = {event.key: event.count for event in profile.key_averages()}
    assert not [key for key in calls if "batch_norm" in key]
    assert calls["aten::convolution"] == 2


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("create", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_second_derivatives(create: Any, affine: Any) -> None:
    rank = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}[create]
    norm = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank]
    model = layers.settle(nn.Sequential(create(2, 3, 2), norm(3))).to(DTYPE)
    example = torch.randn(2, 2, *[3] * rank, dtype=DTYPE, requires_grad=True)
    folded(model, example, affine=affine)
    weights = [p for p in model.parameters() if p.requires_grad]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        assert parameters
        return model(x).tanh()  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, (example, *weights))
    assert torch.autograd.gradgradcheck(run, (example, *weights))


@pytest.mark.parametrize("affine", AFFINE)
def test_it_saves_what_the_network_without_norms_saves(affine: Any) -> None:
    """Bytes are exact: the vectors of C elements, and nothing of the maps or the weights."""
    model, without = net(), net()
    for place in ((without, 1), (without[3], 1), (without, 6)):
        place[0][place[1]] = nn.Identity()
    without[3][0] = nn.Conv2d(4, 6, 3, padding=1, dtype=DTYPE)
    folded(model, affine=affine)
    channels = 4 + 6 + 5
    kept, limit = (saved_bytes(m, x().requires_grad_()) for m in (model, without.train()))
    vectors = 1 if affine == "frozen" else 4
    assert limit <= kept <= limit + vectors * 8 * channels


def test_no_write_to_a_weight_is_missed() -> None:
    """Not through .data, which changes no version, nor through memory shared with NumPy."""
    model, plain = net(), net().eval()
    folded(model)
    for one in (model, plain):
        one[0].weight.data.mul_(2)
        one[3][0].weight.detach().numpy()[:] += 1
    agree(gradients(model), gradients(plain))


@pytest.mark.parametrize("kind", ["SGD", "AdamW fused"])
@pytest.mark.parametrize("affine", AFFINE)
def test_ten_steps(kind: str, affine: Any) -> None:
    model, plain = net(), net().eval()
    folded(model, affine=affine)
    sn.freeze(plain, affine=affine)
    results = []
    for one in (model, plain):
        parameters = list(one.parameters())
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(parameters, 1e-4, momentum=0.9)
            if kind == "SGD"
            else torch.optim.AdamW(parameters, 1e-3, fused=True)
        )
        for step in range(10):
            optimizer.zero_grad()
            one(x(step)).square().mean().backward()
            optimizer.step()
        results.append(one(x()))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-10)


def test_a_weight_written_between_forward_and_backward_raises() -> None:
    """As torch does where it saved the weight."""
    model = folded(net())
    y = model(x().requires_grad_())
    with torch.no_grad():
        model[3][0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ----------------------------------------------------------------------------------- what users do


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "deepcopy of both apart"])
def test_copies_fold_and_are_apart(how: str) -> None:
    model, plain = net(), net().eval()
    folded(model)
    if how == "deepcopy":
        copied = copy.deepcopy(model)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    elif how == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    else:
        copied = nn.Sequential(*[copy.deepcopy(child) for child in model])
    sn.unfreeze(model)
    with torch.no_grad():
        model[0].weight.zero_()
    agree(gradients(copied), gradients(plain))
    if how != "deepcopy of both apart":
        with torch.profiler.profile() as profile:
            copied(x())
        assert not [e.key for e in profile.key_averages() if "batch_norm" in e.key]
    sn.unfreeze(copied)
    assert [type(m) for m in copied.modules()] == [type(m) for m in plain.modules()]


def test_unfreeze_is_as_if_freeze_had_never_been_called() -> None:
    model = net()
    before = Fingerprint(model)
    folded(model, affine="trains").train()
    model(x())
    sn.unfreeze(model)
    assert Fingerprint(model).differences(before) == []


def test_unfreeze_of_one_leaves_the_others_folded() -> None:
    model = folded(net())
    sn.unfreeze(model, "1")
    assert type(model[0]) is nn.Conv2d
    assert type(model[3][0]).__name__ == "FoldingConv2d"
    plain = net().train()
    plain[3][1].eval()
    plain[6].eval()
    agree(gradients(model), gradients(plain), "frozen")


def test_keys_and_parameters_are_untouched() -> None:
    model = net()
    keys, parameters = list(model.state_dict()), list(model.parameters())
    folded(model)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model[0], nn.Conv2d)
    assert "folds=(norm)" in repr(model[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("affine", AFFINE)
def test_autocast_and_half_precision(dtype: torch.dtype, affine: Any) -> None:
    """As far off as the two layers are, and in their dtype."""
    exact = net().eval()(x())
    for cast in (False, True):
        model, plain = net().float(), net().float().eval()
        folded(model, x().float(), affine=affine)
        if cast:
            model, plain = model.to(dtype), plain.to(dtype)
        example = x().to(dtype if cast else torch.float32)
        with torch.autocast("cpu", dtype=dtype, enabled=not cast):
            y, expected = model(example), plain(example)
        assert y.dtype == expected.dtype
        error, allowed = ((t.double() - exact).square().mean().sqrt() for t in (y, expected))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * exact.square().mean().sqrt()
        y.float().square().sum().backward()
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                assert parameter.grad.dtype == parameter.dtype


def test_convolution_under_autocast_and_norm_outside() -> None:
    model = Variant(skipped).float()
    plain = copy.deepcopy(model).eval()
    folded(model, x().float())
    outputs = []
    for one in (model, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z = one.conv(x().float())
        outputs.append(one.norm(z))
    assert outputs[0].dtype == outputs[1].dtype
    torch.testing.assert_close(*outputs, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("order", ["parametrized first", "frozen first"])
@pytest.mark.parametrize("kind", ["weight_norm", "old weight_norm", "spectral_norm"])
def test_computed_weights(kind: str, order: str) -> None:
    def parametrized(model: nn.Module) -> nn.Module:
        if kind == "weight_norm":
            parametrizations.weight_norm(model[0])
        elif kind == "spectral_norm":
            torch.manual_seed(0)
            parametrizations.spectral_norm(model[0]).eval()
        else:
            with pytest.warns(FutureWarning):
                nn.utils.weight_norm(model[0])
        return model

    model, plain = net(), parametrized(net()).eval()
    if order == "parametrized first":
        parametrized(model)
    before = type(model[0]).__mro__[1:]
    folded(model)
    if order == "frozen first":
        parametrized(model)
    model.eval()
    agree(gradients(model), gradients(plain))
    with torch.no_grad():
        for one in (model, plain):
            next(one[0].parameters()).mul_(1.5)
    agree(gradients(model), gradients(plain))
    sn.unfreeze(model)
    if order == "parametrized first":
        assert type(model[0]).__mro__[1:] == before
    if kind == "weight_norm":
        torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
        assert type(model[0]) is nn.Conv2d
    agree(gradients(model), gradients(plain), "both") if kind != "weight_norm" else None


def test_functional_call_and_transforms() -> None:
    from torch.func import functional_call, grad, vmap

    model, plain = net(), net().eval()
    folded(model)
    for one in (model, plain):
        one.requires_grad_(False)
    results = []
    for one in (model, plain):
        weights = {n: 1.1 * p for n, p in one.named_parameters()}
        results.append(functional_call(one, weights, (x(),)))

        def loss(sample: Tensor, one: nn.Module = one) -> Tensor:
            return one(sample.unsqueeze(0)).square().sum()  # type: ignore[no-any-return]

        results.append(vmap(grad(loss))(x()))
    torch.testing.assert_close(results[0], results[2], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(results[1], results[3], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("when", ["compile first", "freeze first"])
def test_compile_in_one_graph(when: str) -> None:
    model, plain = net(), net().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    folded(model)
    if when == "freeze first":
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    agree(gradients(model, compiled), gradients(plain))


def test_a_norm_compiled_apart_is_refused() -> None:
    model = Variant(skipped)
    model.norm.compile(backend="eager")
    report = sn.freeze(model, fold_on=x(), fold_when="always")
    assert "compiled or sharded apart" in dict(report.not_folded)["norm"]


def test_export_trace_and_script() -> None:
    model, plain = net().float(), net().float().eval()
    folded(model, x().float())
    expected, example = plain(x().float()), x().float()
    exported = torch.export.export(model, (example,)).module()
    torch.testing.assert_close(exported(example), expected)
    torch.testing.assert_close(torch.jit.trace(model, example)(example), expected)
    torch.testing.assert_close(torch.jit.script(model)(example), expected)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(example), expected)
    assert [n.op for n in traced.graph.nodes].count("call_module") == 9


def test_saved_tensors_offloaded_by_others() -> None:
    model, plain = net(), net().eval()
    folded(model)
    with torch.autograd.graph.save_on_cpu():
        ours = gradients(model)
    agree(ours, gradients(plain))


def test_backward_twice_and_anomaly_mode() -> None:
    model = folded(net())
    leaf = x().requires_grad_()
    with torch.autograd.detect_anomaly(check_nan=True):
        y = model(leaf).sum()
        (first,) = torch.autograd.grad(y, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(y, leaf)
    assert torch.equal(first, second)


def test_a_replaced_layer_is_the_new_one() -> None:
    model, plain = net(), net().eval()
    folded(model)
    for one in (model, plain):
        torch.manual_seed(5)
        one[0] = nn.Conv2d(3, 4, 3, padding=1, dtype=DTYPE)
        one[3][1] = nn.Identity()
    agree(gradients(model), gradients(plain))


def test_preserved_and_snapshot_undo_folding() -> None:
    model = net()
    before, snapshot = Fingerprint(model), sn.snapshot(model)
    with sn.preserved(model):
        folded(model)
    assert Fingerprint(model).differences(before) == []
    folded(model)
    snapshot.restore(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in net().modules()]


def test_what_looks_at_a_model_sees_it_unfolded() -> None:
    model = folded(net())
    before = Fingerprint(model)
    assert [row.held for row in sn.inspect(model, x()).layers] == ["stillnorm"] * 3
    sn.recalibrate(model, x(), "1")
    sn.check(model, [x()])
    changed = Fingerprint(model).differences(before)
    assert {c.split(" ")[0].rpartition(".")[2] for c in changed} <= {
        f"_buffers[{name}]" for name in ("running_mean", "running_var", "num_batches_tracked")
    }


# ----------------------------------------------------------------------------- reports and refusals


def _refused(model: nn.Module, example: Tensor | None = None, **options: Any) -> dict[str, str]:
    given = x() if example is None else example
    options.setdefault("fold_when", "always")
    return dict(sn.freeze(model, fold_on=given, **options).not_folded)


def test_reasons() -> None:
    def always(between: Any) -> Variant:
        model = Variant(between)
        model.on = True
        return model

    assert "it would be computed twice" in _refused(always(_second_consumer))["norm"]
    assert "add (test_folding.py:" in _refused(always(_second_consumer_add))["norm"]
    assert "getitem stands before it" in _refused(always(_cat))["norm"]
    assert "does not reach it" in _refused(always(skipped))["norm"]
    three = layers.settle(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).to(DTYPE)
    assert (
        "linear on an input (2, 3, 3) stands before it"
        in _refused(three, torch.randn(2, 3, 3, dtype=DTYPE))["1"]
    )
    assert "too small to pay" in _refused(net(), fold_when="pays")["1"]
    first = layers.settle(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1))).to(DTYPE)
    assert "none that the model computes" in _refused(first)["0"]


def _second_consumer(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return m.norm(z) + z.mean()


def _cat(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return m.norm(torch.cat([z, z + 1])[: len(z)])


def _second_consumer_add(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return m.norm(z) + z


def test_the_report_in_words_and_as_data() -> None:
    model = net().eval()
    report = sn.freeze(model, fold_on=x(), fold_when="always")
    assert report.folded == ("1", "3.1", "6")
    assert report.bytes_before is not None
    assert report.bytes_after is not None
    assert report.bytes_after < report.bytes_before
    assert "3 folded into the convolution before" in str(report)
    assert "saved for backward on the example" in str(report)
    assert json.loads(report.to_json())["folded"] == ["1", "3.1", "6"]
    again = sn.freeze(model, fold_on=x(), fold_when="always")
    assert (again.frozen, again.already_frozen, again.folded) == ((), report.folded, report.folded)


def test_examples_of_every_form() -> None:
    for example, forward in (
        (x(), None),
        ((x(),), None),
        ({"input": x()}, None),
        ([1, 2], lambda model, example: model(x())),
    ):
        report = sn.freeze(net(), fold_on=example, fold_when="always", forward=forward)
        assert len(report.folded) == 3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="fold_when='sometimes'"):
        sn.freeze(net(), fold_on=x(), fold_when="sometimes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="forward=lambda"):
        sn.freeze(net(), fold_on=(x(), x()))


@pytest.mark.parametrize("calls", range(1, 4))
def test_all_or_nothing_when_the_model_raises(calls: int) -> None:
    """At the first forward on the example, at the second, at the third."""
    model = net()
    seen = 0

    def forward(model: nn.Module, example: object) -> Tensor:
        nonlocal seen
        seen += 1
        if seen == calls:
            raise KeyboardInterrupt
        return model(example)  # type: ignore[no-any-return]

    before = Fingerprint(model)
    with pytest.raises(KeyboardInterrupt):
        sn.freeze(model, fold_on=x(), fold_when="always", forward=forward)
    assert Fingerprint(model).differences(before) == []


def test_strict_is_about_holding() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(RefusedError):
        sn.freeze(model, fold_on=torch.randn(2, 3, 4, 4), strict=True)
