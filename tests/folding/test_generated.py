"""Random networks, frozen with folding, against the plain network in eval mode and float64.

Whatever stands between a convolution and its norm, now or only after the freeze: outputs and all
gradients are those of the plain network, and unfreeze leaves the network as it was.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import Phase, assume, given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

import stillnorm as sn
from folding.graphs import PARAMETRIZATIONS, Attach, Case, Choices, draw_case, recorders
from stillnorm.holding import held

EXAMPLES = int(os.environ.get("STILLNORM_EXAMPLES", "400"))
RTOL = 1e-9

# Shrinking takes minutes; a failure prints the network, which is small.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)

Outputs = list[Tensor]
Gradients = dict[str, Tensor | None]


# ------------------------------------------------------------------------------------ the oracle


def norms_of(net: nn.Module) -> list[Any]:
    return [m for m in net.modules() if getattr(m, "running_mean", None) is not None]


def plain(case: Case, affine: str) -> nn.Module:
    """The network that was never frozen: its norms are in eval mode, and torch does the rest."""
    attach_all(case.late, case.net)
    for norm in norms_of(case.net):
        norm.eval()
        if affine == "frozen" and norm.weight is not None:
            norm.weight.requires_grad_(False)
            norm.bias.requires_grad_(False)
    return case.net


def attach_all(attachments: list[Attach], net: nn.Module) -> None:
    for attach in attachments:
        attach(net)


@contextlib.contextmanager
def saved_tensors_copied() -> Iterator[None]:
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
    with hooks:
        yield


def plainly(net: nn.Module, x: Tensor, later: bool) -> Outputs:
    return net(x, later)


def by_functional_call(net: nn.Module, x: Tensor, later: bool) -> Outputs:
    """With weights that are computed, not parameters."""
    weights = {name: 1.5 * p for name, p in net.named_parameters() if p.requires_grad}
    return torch.func.functional_call(net, weights, (x, later))


def by_copied_saved_tensors(net: nn.Module, x: Tensor, later: bool) -> Outputs:
    with saved_tensors_copied():
        return net(x, later)


def loss_of(outputs: Outputs) -> Tensor:
    """A number that depends on every value of every output, each in its own way."""
    total = torch.zeros((), dtype=torch.float64)
    for i, y in enumerate(outputs):
        g = torch.Generator().manual_seed(i)
        weights = torch.randn(y.shape, generator=g, dtype=torch.float64)
        total = total + (y.double() * weights).sum() + 0.1 * y.double().square().sum()
    return total


def step(
    net: nn.Module,
    x: Tensor,
    later: bool,
    call: Callable[..., Outputs] = plainly,
    backward: str = "once",
    leaf: bool = True,
) -> tuple[Outputs, Gradients, Outputs]:
    """One forward and backward: the outputs, all gradients, and what the hooks have seen."""
    net.zero_grad()
    for recorder in recorders(net):
        recorder.seen.clear()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(leaf)
    outputs = call(net, x, later)
    loss = loss_of(outputs)
    if backward == "penalty":
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = loss + 0.01 * dx.square().sum()
    if loss.requires_grad:
        loss.backward(retain_graph=backward == "twice")
        if backward == "twice":
            loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters()} | {"x": x.grad}
    gradients = {name: None if g is None else g.clone() for name, g in gradients.items()}
    seen = [value for recorder in recorders(net) for value in recorder.seen]
    if any("checkpoint" in getattr(m, "quirk", "") for m in net.modules()):
        seen.clear()  # what is computed again, and how often, is not promised
    return [y.detach().clone() for y in outputs], gradients, seen


def assert_close(found: Tensor, expected: Tensor, scale: float, what: str) -> None:
    assert found.shape == expected.shape, what
    assert found.dtype == expected.dtype, what
    error = float((found - expected).abs().max()) if found.numel() else 0.0
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    assert error <= RTOL * max(largest, 1e-3 * scale), f"{what}: {error:.3g} of {largest:.3g}"


def assert_same(found: Any, expected: Any, what: str) -> None:
    outputs, gradients, seen = expected
    assert len(found[0]) == len(outputs), what
    for i, (y, y_expected) in enumerate(zip(found[0], outputs, strict=True)):
        assert type(y) is Tensor, what
        assert_close(y, y_expected, 1.0, f"{what}, output {i}")
    scale = max([1.0, *(float(g.abs().max()) for g in gradients.values() if g is not None)])
    assert found[1].keys() == gradients.keys(), what
    for name, g in gradients.items():
        mine = found[1][name]
        if g is None or mine is None:
            assert g is mine, f"{what}, {name}: {mine} is not {g}"
        else:
            assert_close(mine, g, scale, f"{what}, gradient of {name}")
    assert len(found[2]) == len(seen), f"{what}, hooks"
    for value, value_expected in zip(found[2], seen, strict=True):
        assert_close(value, value_expected, scale, f"{what}, hooks")


# ------------------------------------------------------------------------------- what users do


def frozen(pick: Choices, case: Case, affine: str) -> sn.FreezeReport:
    """Freeze with folding, in one go or by detours."""
    how = pick.of(("at once", "at once", "held before", "other affine", "frozen before"))
    other = {"frozen": "trains", "trains": "frozen"}[affine]
    example = {"x": case.xs[0]} if pick.rarely(3) else (case.xs[0], False)
    fold = {"fold_on": example, "fold_when": "always"}
    if how == "held before":
        sn.freeze(case.net, affine=affine)
    elif how == "other affine":
        sn.freeze(case.net, affine=other, **fold)
    elif how == "frozen before":
        sn.freeze(case.net, affine=affine, **fold)
        sn.unfreeze(case.net)
    return sn.freeze(case.net, affine=affine, **fold)


def copied(pick: Choices, net: nn.Module) -> nn.Module:
    how = pick.of(("", "", "", "deepcopy", "pickle", "torch.save"))
    if how == "deepcopy":
        return copy.deepcopy(net)
    if how == "pickle":
        return pickle.loads(pickle.dumps(net))
    if how == "torch.save":
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)
    return net


def modes_called(pick: Choices, net: nn.Module) -> None:
    how = pick.of(("", "train", "eval", "train the norms", "written"))
    if how in ("train", "eval"):
        getattr(net, how)()
    for norm in norms_of(net):
        if how == "train the norms":
            norm.train()
        elif how == "written":
            norm.training = True


def attributes(net: nn.Module) -> dict[str, tuple[type, set[str]]]:
    return {path: (type(m), set(vars(m))) for path, m in net.named_modules()}


def assert_as_before(net: nn.Module, before: dict[str, Any], late: list[Attach]) -> None:
    """Unfrozen, every layer has its class and its attributes again."""
    changed = {attach.path for attach in late if "weight_norm" in attach.what}
    changed = {id(net.get_submodule(path)) for path in changed}
    for path, module in net.named_modules():
        if parametrize.is_parametrized(module) or id(module) in changed:
            assert "olding" not in "".join(c.__name__ for c in type(module).__mro__), path
            assert not any("stillnorm" in name for name in vars(module)), path
        elif path in before:
            assert type(module) is before[path][0], path
            assert set(vars(module)) == before[path][1], path


# ------------------------------------------------------------------------------------- the tests


Tell = Callable[[str], object]


def run_exactly(pick: Choices, tell: Tell = str) -> tuple[Case, sn.FreezeReport] | None:
    """Draw a network, freeze it, train it, unfreeze it; None where plain torch cannot run it."""
    case = draw_case(pick)
    tell(f"{case.net}\nbefore: {case.early}\nafter: {case.late}\non {tuple(case.xs[0].shape)}")
    twin = draw_case(pick.again())
    affine = pick.of(("frozen", "trains"))
    oracle = plain(twin, affine)
    lr = 1e-3
    first = pick.of((True, False))
    call: Any = pick.of((plainly, plainly, plainly, by_copied_saved_tensors, by_functional_call))
    backward = pick.of(("once", "once", "once", "twice", "penalty"))
    if case.is_checkpointed or case.has("old weight_norm"):
        call, backward = plainly, "once"
    leaf = backward == "penalty" or case.is_checkpointed or not pick.rarely(3)
    laters = [first, pick.of((True, False)), not first]
    expected: list[Any] = []
    optimizer = torch.optim.SGD(oracle.parameters(), lr)
    try:
        for later, x in zip(laters, case.xs[1:], strict=True):
            expected.append(step(oracle, x, later, call, backward, leaf))
            optimizer.step()
        draw_case(pick.again()).net(case.xs[0], False)  # the example, as freeze finds the network
        with torch.no_grad():
            at_the_end = [y.clone() for y in oracle(case.xs[1], first)]
    except (RuntimeError, TypeError, ValueError):
        return None
    finite = all(torch.isfinite(y).all() for run in expected for y in run[0])
    if not finite or any(float(y.abs().max()) > 1e6 for run in expected for y in run[0]):
        return None

    before, keys = attributes(case.net), list(case.net.state_dict())
    report = frozen(pick, case, affine)
    assert report.refused == ()
    assert list(case.net.state_dict()) == keys
    net, late_first = case.net, pick.of((True, False))
    if late_first:
        attach_all(case.late, net)
    if not any(map(case.has, PARAMETRIZATIONS)):  # whose classes are not to be pickled
        net = copied(pick, net)
    if not late_first:
        attach_all(case.late, net)
    keys = list(oracle.state_dict())
    assert list(net.state_dict()) == keys
    optimizer = torch.optim.SGD(net.parameters(), lr)
    for i, (later, x) in enumerate(zip(laters, case.xs[1:], strict=True)):
        modes_called(pick, net)
        found = step(net, x, later, call, backward, leaf)
        assert_same(found, expected[i], f"step {i}, later={later}")
        assert list(net.state_dict()) == keys
        optimizer.step()
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            for y, y_expected in zip(net(case.xs[1], first), at_the_end, strict=True):
                assert_close(y, y_expected, 1.0, f"in the end, {quiet.__name__}")
    released = sn.unfreeze(net)
    assert released.refused == ()
    assert list(net.state_dict()) == keys
    assert_as_before(net, before, case.late)
    for norm in norms_of(net):
        norm.eval()
    with torch.no_grad():
        for y, y_expected in zip(net(case.xs[1], first), at_the_end, strict=True):
            assert_close(y, y_expected, 1.0, "unfrozen")
    return case, report


def choices_of(data: st.DataObject) -> Choices:
    return Choices(lambda n: data.draw(st.integers(0, n - 1)) if n > 1 else 0)


def chance(seed: int) -> Choices:
    g = random.Random(seed)
    return Choices(lambda n: g.randrange(n))


@settings(max_examples=EXAMPLES, phases=PHASES)
@given(data=st.data())
def test_a_frozen_network_is_the_plain_network_in_eval_mode(data: st.DataObject) -> None:
    assume(run_exactly(choices_of(data), note) is not None)


# ------------------------------------------------------------------------------- low precision

AUTOCAST = "autocast"
DTYPES = (torch.float32, torch.bfloat16, AUTOCAST)


def without(gradients: Gradients) -> set[str]:
    return {name for name, g in gradients.items() if g is None}


def errors(found: Any, exact: Any) -> tuple[float, float]:
    """The rms errors of outputs and of gradients, each tensor relative to its largest value."""

    def rms(pairs: list[tuple[Tensor, Tensor]]) -> float:
        scales = [float(b.abs().max()) for _, b in pairs]
        floor = 1e-3 * max(scales, default=1.0) + 1e-30
        squares = [
            float(((a.double() - b) / max(scale, floor)).square().mean())
            for (a, b), scale in zip(pairs, scales, strict=True)
        ]
        return (sum(squares) / max(len(squares), 1)) ** 0.5

    names = [name for name, g in exact[1].items() if g is not None]
    outputs = list(zip(found[0], exact[0], strict=True))
    return rms(outputs), rms([(found[1][name], exact[1][name]) for name in names])


def run_nearly(pick: Choices, tell: Tell = str) -> tuple[Case, sn.FreezeReport] | None:
    """The same in low precision: the errors are those of the plain network there."""
    case = draw_case(pick, smooth=True)
    tell(f"{case.net}\nbefore: {case.early}\nafter: {case.late}\non {tuple(case.xs[0].shape)}")
    again = [pick.again(), pick.again()]
    plain_case, exact_case = (draw_case(choices, smooth=True) for choices in again)
    affine, kind = pick.of(("frozen", "trains")), pick.of(DTYPES)
    dtype = torch.float32 if kind is AUTOCAST else kind
    unit = torch.finfo(torch.bfloat16 if kind is AUTOCAST else dtype).eps
    if any("autocast" in quirk for quirk in case.quirks):
        unit = torch.finfo(torch.bfloat16).eps
    for each in (case, plain_case):
        each.net.to(dtype)
    exact_case.net.to(dtype).double()
    xs = [x.to(dtype) for x in case.xs]
    later = pick.of((True, False))

    def run(net: nn.Module, x: Tensor) -> Any:
        cast = torch.autocast("cpu", torch.bfloat16, enabled=kind is AUTOCAST)
        with cast if x.dtype == dtype else contextlib.nullcontext():
            return step(net, x, later)

    try:
        exact = run(plain(exact_case, affine), xs[1].double())
        unfolded = run(plain(plain_case, affine), xs[1])
        draw_case(pick.again(), smooth=True).net.to(dtype)(xs[0], False)  # as freeze finds it
    except (RuntimeError, TypeError, ValueError):
        return None
    if not all(torch.isfinite(y).all() for y in (*exact[0], *unfolded[0])):
        return None
    if without(exact[1]) != without(unfolded[1]):  # autocast keeps casts made without gradients
        return None
    report = sn.freeze(case.net, affine=affine, fold_on=(xs[0], False), fold_when="always")
    for attach in case.late:
        attach(case.net)
    case.net.train()
    folded = run(case.net, xs[1])
    assert [y.dtype for y in folded[0]] == [y.dtype for y in unfolded[0]]
    assert without(folded[1]) == without(unfolded[1])
    for what, mine, theirs in zip(
        ("outputs", "gradients"), errors(folded, exact), errors(unfolded, exact), strict=True
    ):
        assert mine <= 4 * theirs + 8 * unit, f"{kind}, {what}: {mine:.3g}, plain {theirs:.3g}"
    return case, report


@settings(max_examples=max(1, EXAMPLES // 4), phases=PHASES)
@given(data=st.data())
def test_in_low_precision_it_errs_no_more_than_the_plain_network(data: st.DataObject) -> None:
    assume(run_nearly(choices_of(data), note) is not None)


# ------------------------------------------------------------------ that all this does something

FOLDING = (
    *("linear", "conv1d", "conv2d", "conv3d"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("grouped", "grouped and transposed", "strided", "dilated"),
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "InstanceNorm"),
    *("ActBatchNorm", "GatedBatchNorm", "SuperBatchNorm"),
)


def test_the_networks_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: Counter[str] = Counter()
    may_fold = held.may_fold

    def counted(x: Any, layer: Any, *rest: Any) -> bool:
        folds = may_fold(x, layer, *rest)
        if folds and torch.is_grad_enabled():
            name, geometry = layer.held_base.__name__, x.call.geometry
            seen[x.call.function.__name__] += 1
            seen[name if name.startswith(("Batch", "Sync")) else name[:-2]] += 1
            if geometry is not None:
                kind = "grouped and transposed" if geometry.transposed else "grouped"
                seen[kind] += geometry.groups > 1
                seen["strided"] += max(geometry.stride) > 1
                seen["dilated"] += max(geometry.dilation) > 1
        return folds

    monkeypatch.setattr(held, "may_fold", counted)
    norms, folded, ran = 0, 0, 0
    for seed in range(200):
        found = run_exactly(chance(seed))
        if found is not None:
            ran += 1
            folded += len(found[1].folded)
            norms += len(found[1].frozen) + len(found[1].already_frozen)
    assert ran > 170
    assert folded > norms / 3
    assert seen.total() > 1000
    assert all(seen[kind] >= 3 for kind in FOLDING), seen
