"""Pooled statistics against all values at once; averaged weights with statistics of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stillnorm.averages import match_average, pool_statistics
from stillnorm.errors import CalibrationError, StateError
from support.fingerprint import Fingerprint
from support.layers import conv_input, conv_net
from support.oracles import pooled_moments
from support.tolerances import STATISTICS_RTOL
from support.zoo import timm

Entry = dict[str, Tensor]


def state_of(values: Tensor, dtype: torch.dtype = torch.float64, path: str = "bn") -> Entry:
    """What a norm layer keeps of values, (N, C), in torch's convention."""
    return {
        f"{path}.running_mean": values.double().mean(0).to(dtype),
        f"{path}.running_var": values.double().var(0, correction=1).to(dtype),
        f"{path}.num_batches_tracked": torch.tensor(len(values)),
    }


def trained(seed: int = 0) -> nn.Sequential:
    """A net with three norms whose statistics have moved."""
    net = conv_net(seed).train()
    net(conv_input(seed=seed))
    return net


# ------------------------------------------------------------------ the moments


@settings(max_examples=300)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=6),
    channels=st.integers(1, 4),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    apart=st.sampled_from([0.0, 1.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_with_counts_they_are_those_of_all_values_at_once(
    sizes: list[int], channels: int, dtype: torch.dtype, apart: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    parts = [
        torch.randn(n, channels, generator=draw, dtype=torch.float64)
        + apart * torch.randn(channels, generator=draw, dtype=torch.float64)
        for n in sizes
    ]
    pooled = pool_statistics([state_of(part, dtype) for part in parts], sizes)
    mean, var = pooled_moments(parts)
    # What the sources are rounded to, a mean in units of the largest, is what the result can be.
    eps = 1e-13 if dtype is torch.float64 else 2 * torch.finfo(dtype).eps
    largest = max(float(part.mean(0).abs().max()) for part in parts)
    scale = largest * float(torch.cat(parts).std(0).max() + 1)
    torch.testing.assert_close(
        pooled["bn.running_mean"].double(), mean, rtol=eps, atol=eps * largest
    )
    torch.testing.assert_close(
        pooled["bn.running_var"].double(), var, rtol=2 * eps, atol=4 * eps * scale
    )
    assert pooled["bn.running_mean"].dtype == pooled["bn.running_var"].dtype == dtype


@given(
    sources=st.integers(1, 6),
    size=st.integers(2, 30),
    seed=st.integers(0, 2**31),
)
def test_without_counts_they_are_those_of_equal_parts(sources: int, size: int, seed: int) -> None:
    """Of biased variances the result is biased, and exact."""
    values = torch.randn(
        sources, size, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    values += 5 * values[:, :1]
    states = [
        {"bn.running_mean": part.mean(0), "bn.running_var": part.var(0, correction=0)}
        for part in values
    ]
    pooled = pool_statistics(states)
    flat = values.flatten(0, 1)
    torch.testing.assert_close(pooled["bn.running_mean"], flat.mean(0))
    torch.testing.assert_close(pooled["bn.running_var"], flat.var(0, correction=0))


def test_without_counts_is_the_limit_of_many() -> None:
    states = [state_of(torch.randn(9, 3) + i) for i in range(3)]
    many = pool_statistics(states, [10**12] * 3)
    for key, value in pool_statistics(states).items():
        torch.testing.assert_close(value, many[key], rtol=1e-11, atol=0)


def test_of_norms_that_saw_shards() -> None:
    """The values of a 2d norm are those of all pixels; what torch computed is what is pooled."""
    shards = [torch.randn(n, 3, 5, 5) * (i + 1) + 4 * i for i, n in enumerate((4, 2, 7))]
    norms = [nn.BatchNorm2d(3, momentum=1.0).train() for _ in shards]
    for norm, shard in zip(norms, shards, strict=True):
        norm(shard)
    pooled = pool_statistics(norms, [25 * len(shard) for shard in shards])
    mean, var = pooled_moments(shards)
    torch.testing.assert_close(pooled["running_mean"].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pooled["running_var"].double(), var, rtol=STATISTICS_RTOL, atol=0.0)
    averaged = torch.stack([norm.running_var for norm in norms]).double().mean(0)
    assert (averaged < 0.6 * var).all(), "the near miss: variances averaged, the spread forgotten"


def test_samples_for_values_are_off_by_less_than_one_in_the_smallest_count() -> None:
    shards = [torch.randn(n, 3, 6, 6) * (i + 1) for i, n in enumerate((5, 20, 11))]
    states = [state_of(shard.movedim(1, -1).flatten(0, 2)) for shard in shards]
    _, var = pooled_moments(shards)
    off = pool_statistics(states, [len(shard) for shard in shards])["bn.running_var"] / var - 1
    assert 0 < off.abs().max() < 1 / 5


def test_pooling_in_two_steps_is_pooling_at_once() -> None:
    parts = [torch.randn(n, 3) + n for n in (4, 6, 10)]
    states = [state_of(part) for part in parts]
    first = pool_statistics(states[:2], [4, 6])
    twice, once = pool_statistics([first, states[2]], [10, 10]), pool_statistics(states, [4, 6, 10])
    for key in ("bn.running_mean", "bn.running_var"):
        torch.testing.assert_close(twice[key], once[key], rtol=1e-13, atol=1e-13)


def test_instance_norms_have_no_spread() -> None:
    """Their convention: the average over samples; a model says that a layer is one."""
    shards = [torch.randn(n, 3, 6) + 5 * n for n in (2, 6)]
    norms = []
    for shard in shards:
        norm = nn.InstanceNorm1d(3, momentum=1.0, track_running_stats=True).train()
        norm(shard)
        norms.append(norm)
    every = torch.cat(shards).double()
    pooled = pool_statistics([norms[0].state_dict(), norms[1]], [2, 6])
    expected = {"running_mean": every.mean(2).mean(0), "running_var": every.var(2).mean(0)}
    for key, value in expected.items():
        torch.testing.assert_close(pooled[key].double(), value, rtol=1e-6, atol=1e-6)
    weighed_equally = pool_statistics(norms)["running_var"]
    torch.testing.assert_close(weighed_equally, (norms[0].running_var + norms[1].running_var) / 2)


def test_one_source_gives_its_own_statistics() -> None:
    net = trained()
    for counts in (None, [7]):
        pooled = pool_statistics([net], counts)
        for key, value in pooled.items():
            assert torch.equal(value, net.state_dict()[key])


# ------------------------------------------------------------------ what comes out


def test_it_loads_into_the_model_and_holds_nothing_else() -> None:
    nets = [trained(seed) for seed in range(3)]
    pooled = pool_statistics(nets)
    norms = ("running_mean", "running_var", "num_batches_tracked")
    assert list(pooled) == [key for key in nets[0].state_dict() if key.endswith(norms)]
    fresh = conv_net(9)
    before = copy.deepcopy(fresh.state_dict())
    missing, unexpected = fresh.load_state_dict(pooled, strict=False)
    assert unexpected == []
    for key in missing:
        assert torch.equal(fresh.state_dict()[key], before[key])
    for key, value in pooled.items():
        assert torch.equal(fresh.state_dict()[key], value)


def test_the_sources_are_only_looked_at_and_the_result_is_its_own() -> None:
    nets = [trained(seed) for seed in range(2)]
    before = [Fingerprint(net) for net in nets]
    for value in pool_statistics([nets[0], nets[1].state_dict()]).values():
        value.fill_(77)
    assert [Fingerprint(net) for net in nets] == before


def test_the_counter_is_an_integer_and_the_first_ones() -> None:
    states = [state_of(torch.randn(n, 2)) for n in (5, 8)]
    pooled = pool_statistics(states)
    assert pooled["bn.num_batches_tracked"].dtype == torch.int64
    assert pooled["bn.num_batches_tracked"].item() == 5
    del states[0]["bn.num_batches_tracked"]
    assert "bn.num_batches_tracked" not in pool_statistics(states)


def test_the_dtype_is_the_first_ones() -> None:
    half, double = (state_of(torch.randn(5, 2), d) for d in (torch.float16, torch.float64))
    assert pool_statistics([half, double])["bn.running_var"].dtype == torch.float16
    assert pool_statistics([double, half])["bn.running_var"].dtype == torch.float64


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compile": torch.compile,
    "both": lambda net: nn.DataParallel(torch.compile(net)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_do_not_matter_and_the_keys_are_the_first_ones(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    plain, other = trained(1), trained(2)
    wrapped = wrap(other)
    expected = pool_statistics([plain, other])
    for source in (wrapped, wrapped.state_dict()):
        pooled = pool_statistics([plain, source])
        assert list(pooled) == list(expected)
        assert all(torch.equal(pooled[key], expected[key]) for key in expected)
    assert (
        wrapped.load_state_dict(pool_statistics([wrapped, plain]), strict=False).unexpected_keys
        == []
    )


def test_a_child_called_module_is_the_users_own() -> None:
    net = nn.ModuleDict({"module": nn.BatchNorm1d(2), "head": nn.BatchNorm1d(2)})
    pooled = pool_statistics([net, copy.deepcopy(net)])
    assert [key for key in pooled if key.endswith("mean")] == [
        "module.running_mean",
        "head.running_mean",
    ]


def test_rows_of_one_stacked_state_are_different_sources() -> None:
    stacked = {"bn.running_mean": torch.randn(3, 2), "bn.running_var": torch.rand(3, 2)}
    rows = [{key: value[i] for key, value in stacked.items()} for i in range(3)]
    torch.testing.assert_close(
        pool_statistics(rows)["bn.running_mean"], stacked["bn.running_mean"].mean(0)
    )


# ------------------------------------------------------------------ what is refused


def good(seed: int = 0) -> Entry:
    draw = torch.Generator().manual_seed(seed)
    return state_of(torch.randn(6, 3, generator=draw), torch.float32)


def spoiled(part: str, value: float) -> Entry:
    state = good(1)
    state[f"bn.{part}"][2] = value
    return state


def of_one_model(net: nn.Module) -> list[Any]:
    states = []
    for seed in range(2):
        net.train()(conv_input(seed=seed))
        states.append(net.state_dict())
    return states


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyBatchNorm1d())


BAD: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "none": ([], None, CalibrationError, "there is no source"),
    "one model": (nn.BatchNorm1d(3), None, StateError, "sources= is one source"),
    "one state dict": (good(), None, StateError, "sources= is one source"),
    "a path": (["model.pt"], None, StateError, "source 0 is a str"),
    "no norms": ([{"w": torch.ones(2)}], None, StateError, "source 0 has no norm layer with"),
    "nested": ([{"state_dict": good()}], None, StateError, "source 0 has no norm layer with"),
    "missing layer": (
        [good() | state_of(torch.randn(5, 3), path="b.2"), good(1)],
        None,
        StateError,
        r"source 1 has no norm layer b\.2, which source 0 has",
    ),
    "further layer": (
        [good(), good(1) | state_of(torch.randn(5, 3), path="b.2")],
        None,
        StateError,
        r"source 0 has no norm layer b\.2, which source 1 has",
    ),
    "shape": (
        [good(), state_of(torch.randn(5, 4))],
        None,
        StateError,
        r"bn\.running_mean of source 1 is \(4,\), of source 0 \(3,\)",
    ),
    "meta": (
        [good(), nn.ModuleDict({"bn": nn.BatchNorm1d(3, device="meta")})],
        None,
        StateError,
        r"bn\.running_mean of source 1 has no value",
    ),
    "lazy": ([lazy(), lazy()], None, StateError, r"0\.running_mean of source 0 has no value"),
    "nan mean": (
        [good(), spoiled("running_mean", float("nan"))],
        None,
        CalibrationError,
        r"bn\.running_mean of source 1 is nan in channel 2",
    ),
    "infinite variance": (
        [good(), spoiled("running_var", float("inf"))],
        None,
        CalibrationError,
        r"bn\.running_var of source 1 is inf in channel 2",
    ),
    "negative variance": (
        [spoiled("running_var", -0.5), good()],
        None,
        CalibrationError,
        r"bn\.running_var of source 0 is -0\.5 in channel 2",
    ),
    "few counts": ([good(), good(1)], [4], CalibrationError, "1 number in counts= for 2 sources"),
    "many counts": ([good()], [4, 4], CalibrationError, "2 numbers in counts= for 1 source"),
    "negative count": ([good(), good(1)], [4, -4], CalibrationError, "count -4 of source 1"),
    "weights": ([good(), good(1)], [0.5, 0.5], CalibrationError, "count 0.5 of source 0"),
    "ones": ([good(), good(1)], [1, 1], CalibrationError, "count 1 of source 0"),
    "state_dict of one model": (
        of_one_model(conv_net()),
        None,
        StateError,
        "source 1 is the same tensors as source 0",
    ),
    "too large for half": (
        [
            {"bn.running_mean": m.half(), "bn.running_var": torch.ones(1).half()}
            for m in torch.tensor([[-6e4], [6e4]])
        ],
        None,
        CalibrationError,
        r"bn\.running_var: the pooled 3\.6e\+09 does not fit float16",
    ),
}


@pytest.mark.parametrize(("sources", "counts", "kind", "message"), BAD.values(), ids=BAD)
def test_what_cannot_be_pooled_is_named(
    sources: Any, counts: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        pool_statistics(sources, counts)


def test_a_shared_backbone_does_not_make_two_sources_one() -> None:
    backbone = nn.BatchNorm1d(3)
    a, b = (nn.Sequential(backbone, nn.BatchNorm1d(3)) for _ in range(2))
    assert torch.equal(pool_statistics([a, b])["0.running_var"], torch.ones(3))


# ------------------------------------------------------------------ averaged weights


def tiny(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 3),
    )


def task() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x, w = torch.randn(512, 8), torch.randn(8, 3)
    return x, (torch.tanh(x @ w) + 0.3 * torch.randn(512, 3)).argmax(1)


def train(net: nn.Module, steps: int, average: AveragedModel | None = None, seed: int = 0) -> None:
    (x, y), draw = task(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), 0.2, momentum=0.9)
    for step in range(steps):
        rows = torch.randint(len(x), (64,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(net.train()(x[rows]), y[rows]).backward()
        optimizer.step()
        if average is not None and step >= steps // 2 and step % 10 == 0:
            average.update_parameters(net)


def errors(net: nn.Module) -> tuple[float, float]:
    """How far the statistics are from the true moments: of means in deviations, of variances."""
    x, _ = task()
    received: dict[nn.Module, Tensor] = {}
    true = copy.deepcopy(net).double().train()
    for module in true.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 0.0
            module.register_forward_pre_hook(lambda m, args: received.update({m: args[0].detach()}))
    true(x.double())
    off = [
        (
            float(((m.running_mean - v.mean(0)).square() / v.var(0)).mean().sqrt()),
            abs(float((m.running_var / v.var(0)).log().mean().expm1())),
        )
        for m, v in received.items()
    ]
    return max(mean for mean, _ in off), max(var for _, var in off)


@pytest.mark.parametrize(
    ("use_buffers", "ema", "mean_off", "var_off"),
    [(True, False, 0.005, 0.01), (True, True, 0.005, 0.01), (False, False, 0.1, 0.2)],
    ids=["SWA of buffers", "EMA of buffers", "SWA, last buffers"],
)
def test_statistics_of_averaged_weights_are_not_the_average(
    use_buffers: bool, ema: bool, mean_off: float, var_off: float
) -> None:
    """Before: off by what the docstring says, about; afterwards: exact."""
    net = tiny()
    average = AveragedModel(
        net, multi_avg_fn=get_ema_multi_avg_fn(0.9) if ema else None, use_buffers=use_buffers
    )
    train(net, 400, average)
    mean, var = errors(average)
    assert mean > mean_off
    assert var > var_off
    updates, before = int(average.n_averaged), Fingerprint(average, versions=False)
    report = match_average(average, [task()[0]], source=net)
    assert [layer.path for layer in report.layers] == ["1", "4"]
    mean, var = errors(average)
    assert mean < STATISTICS_RTOL
    assert var < STATISTICS_RTOL
    assert int(average.n_averaged) == updates == 20
    report.undo()
    assert not Fingerprint(average, versions=False).differences(before)


def test_a_soup_has_too_large_variances_averaged_or_pooled() -> None:
    nets = [tiny() for _ in range(4)]
    for seed, net in enumerate(nets):
        train(net, 200, seed=seed)
    soup = tiny()
    weights = {
        key: torch.stack([net.state_dict()[key].double() for net in nets]).mean(0)
        for key in soup.state_dict()
    }
    soup.load_state_dict(weights)
    mine = soup[1].running_var.clone()
    match_average(soup, [task()[0]])
    assert (mine / soup[1].running_var).log().mean().exp() > 1.15
    pooled = pool_statistics(nets)["1.running_var"]
    assert (pooled > mine).all(), "the spread is added, and the averaged weights have none"


def test_shards_of_one_model_pool_to_what_recalibration_finds() -> None:
    """Same weights, other data: here pooling is all that is needed, in the first norm exactly."""
    x, net = task()[0], tiny()
    shards = list(x.split([200, 100, 212]))
    ranks = [copy.deepcopy(net) for _ in shards]
    for rank, shard in zip(ranks, shards, strict=True):
        for module in rank.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = 1.0
        rank.train()(shard)
    pooled = pool_statistics(ranks, [len(shard) for shard in shards])
    match_average(net, [x])
    torch.testing.assert_close(
        pooled["1.running_var"], net[1].running_var, rtol=2 * STATISTICS_RTOL, atol=0.0
    )


def test_an_average_that_was_never_updated() -> None:
    net, (x, _) = tiny(), task()
    for average in (AveragedModel(net), torch.compile(AveragedModel(net))):
        before = Fingerprint(average)
        with pytest.raises(StateError, match="n_averaged is 0"):
            match_average(average, [x])
        assert Fingerprint(average) == before


def test_an_average_in_the_memory_of_its_source() -> None:
    net, average = tiny(), tiny(1)
    match_average(average, [task()[0]], source=net)
    average[4].running_var = net[4].running_var
    before = Fingerprint(average), Fingerprint(net)
    with pytest.raises(StateError, match=r"4\.running_var of the average is the source's"):
        match_average(average, [task()[0]], source=net)
    with pytest.raises(StateError, match=r"0\.weight of the average is the source's"):
        match_average(net, [task()[0]], source=net)
    assert (Fingerprint(average), Fingerprint(net)) == before


@pytest.mark.parametrize("name", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_timm_averages(name: str) -> None:
    net = tiny()
    ema = getattr(timm.utils, name)(net, decay=0.5)
    train(net, 20)
    ema.update(net)
    average = ema
    if name == "ModelEma":
        with pytest.raises(StateError, match="a ModelEma is not a model"):
            match_average(ema, [task()[0]])
        average = ema.ema
    assert len(match_average(average, [task()[0]], source=net).layers) == 2
    mean, var = errors(average)
    assert mean < STATISTICS_RTOL
    assert var < STATISTICS_RTOL
    assert not any(module.training for module in average.modules() if module is not ema)


def test_options_are_those_of_recalibrate() -> None:
    net, seen = tiny(), []
    average = AveragedModel(net)
    average.update_parameters(net)

    def forward(model: nn.Module, batch: Any) -> Tensor:
        seen.append(model)
        return model(batch["x"])

    data = [{"x": part} for part in task()[0].split(64)]
    report = match_average(average, data, "4", forward=forward, method="sequential", max_batches=3)
    assert [layer.path for layer in report.layers] == ["4"]
    assert (report.batches, report.method) == (3, "sequential")
    assert set(seen) == {average}


def test_the_next_update_goes_on_or_replaces() -> None:
    """What the docstring says of updates after matching."""
    for use_buffers in (True, False):
        net = tiny()
        average = AveragedModel(net, use_buffers=use_buffers)
        average.update_parameters(net)
        match_average(average, [task()[0]])
        matched = average.module[1].running_mean.clone()
        average.update_parameters(net)
        expected = (matched + net[1].running_mean) / 2 if use_buffers else net[1].running_mean
        torch.testing.assert_close(average.module[1].running_mean, expected)
