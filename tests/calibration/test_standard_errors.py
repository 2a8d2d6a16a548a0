"""Standard errors from batch means: right for any data, whatever is correlated inside a batch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stillnorm import recalibrate
from stillnorm.calibration import Progress
from stillnorm.calibration.data import LEAST_BATCHES, Data
from stillnorm.calibration.pool import Pools
from stillnorm.calibration.pooled import pooled_pass
from stillnorm.calibration.ranks import Ranks
from stillnorm.errors import CalibrationError
from stillnorm.norms import find_norms
from support.layers import conv_input, conv_net


def correlated(n: int, generator: torch.Generator) -> Tensor:
    """A batch whose samples have levels and scales of their own, the same at all positions."""
    level = torch.randn(n, 3, 1, generator=generator, dtype=torch.float64)
    scale = torch.rand(n, 3, 1, generator=generator, dtype=torch.float64) + 0.5
    return level + scale * torch.randn(n, 3, 25, generator=generator, dtype=torch.float64) + 7


def by_formula(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The influences of whole batches, from the values themselves."""
    flat = [x.transpose(0, 1).flatten(1) for x in batches]
    everything = torch.cat(flat, 1)
    n, big = everything.shape[1], len(flat)
    mean, var = everything.mean(1, keepdim=True), everything.var(1, correction=0, keepdim=True)
    on_mean = torch.stack([(x - mean).sum(1) / n for x in flat])
    on_var = torch.stack([((x - mean).square() - var).sum(1) / n for x in flat])
    scale = big / (big - 1)
    return (scale * on_mean.square().sum(0)).sqrt(), (scale * on_var.square().sum(0)).sqrt()


@settings(max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=9),
    st.sampled_from([0.0, 30.0, 1e4]),
    st.integers(0, 99),
)
def test_as_the_formula_on_all_values(sizes: list[int], offset: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    batches = [correlated(n, g) + offset for n in sizes]
    (layer,) = recalibrate(nn.BatchNorm1d(3).double(), iter(batches)).layers
    of_mean, of_var = by_formula(batches)
    torch.testing.assert_close(layer.mean_error, of_mean, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(layer.var_error, of_var, rtol=1e-6, atol=1e-9)


@given(st.lists(st.integers(1, 5), min_size=4, max_size=9), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=20)
def test_merging_ranks_is_one_process(sizes: list[int], cut: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    batches = [correlated(n, g) + 5 * i for i, n in enumerate(sizes)]
    net = nn.BatchNorm1d(3).double()
    (layer,) = find_norms(net)

    def pooled(part: list[Tensor]) -> Pools:
        data, alone = Data(iter(part)), Ranks("self", torch.device("cpu"))
        vectors: list[Tensor] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pools, "to_vector", lambda self: vectors.append(real(self)) or real(self))
            pooled_pass(net, [layer], data, alone)
        return Pools.of_vector([layer], vectors[0])

    real = Pools.to_vector
    merged = pooled(batches[:cut])
    merged.merge(pooled(batches[cut:]))
    (one,) = merged
    errors = one.standard_errors()
    assert errors is not None
    for got, want in zip(errors, by_formula(batches), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def test_it_is_the_deviation_of_the_estimate_over_many_draws() -> None:
    g = torch.Generator().manual_seed(0)
    layer = nn.BatchNorm1d(3).double()
    means, variances, told = [], [], []
    for _ in range(300):
        (done,) = recalibrate(layer, iter([correlated(6, g) for _ in range(20)])).layers
        means.append(done.mean_after)
        variances.append(done.var_after)
        told.append((done.mean_error, done.var_error))
    for estimates, which in ((means, 0), (variances, 1)):
        true = torch.stack(estimates).std(0)
        shown = torch.stack([t[which] for t in told]).mean(0)  # type: ignore[misc]
        assert (shown / true - 1).abs().max() < 0.2
    naive = torch.stack(variances).mean(0).sqrt().mean() / math.sqrt(20 * 6 * 25)
    assert torch.stack(means).std(0).mean() > 3 * naive, "positions as samples would be far off"


def test_instance_norm_averages_samples() -> None:
    layer = nn.InstanceNorm1d(3, track_running_stats=True).double()
    g = torch.Generator().manual_seed(0)
    batches = [correlated(n, g) for n in (4, 6, 5, 3)]
    (done,) = recalibrate(layer, iter(batches)).layers
    n = 18
    for values, told in ((2, done.mean_error), (3, done.var_error)):
        per = [x.mean(2) if values == 2 else x.var(2) for x in batches]
        mean = torch.cat(per).mean(0)
        influence = torch.stack([(p - mean).sum(0) / n for p in per])
        assert told is not None
        error = (4 / 3 * influence.square().sum(0)).sqrt()
        torch.testing.assert_close(told, error, rtol=1e-6, atol=0)


def test_one_batch_tells_no_error() -> None:
    report = recalibrate(nn.BatchNorm1d(3), torch.randn(9, 3))
    assert report.layers[0].mean_error is report.layers[0].standard_error is None
    assert report.standard_error is None
    assert report.to_json()


def test_equal_batches_have_none() -> None:
    x = torch.randn(9, 3) + 50
    report = recalibrate(nn.BatchNorm1d(3), iter([x, x, x]))
    assert report.standard_error == pytest.approx(0, abs=1e-6)


def test_constant_channels_do_not_hide_the_others() -> None:
    x = [torch.randn(9, 2) * torch.tensor([1.0, 0.0]) for _ in range(4)]
    report = recalibrate(nn.BatchNorm1d(2), iter(x))
    assert report.standard_error is not None
    assert report.standard_error > 0.05


# ------------------------------------------------------------------ stopping


def endless() -> Iterator[Tensor]:
    seed = 0
    while True:
        seed += 1
        yield conv_input(4, seed=seed)


@pytest.mark.parametrize("method", ["pooled", "sequential"])
def test_it_stops_where_it_knows_enough(method: str) -> None:
    loose = recalibrate(conv_net(), endless(), tolerance=0.2, method=method)  # type: ignore[arg-type]
    tight = recalibrate(conv_net(), endless(), tolerance=0.1, method=method)  # type: ignore[arg-type]
    assert loose.standard_error is not None
    assert tight.standard_error is not None
    assert LEAST_BATCHES <= loose.batches < tight.batches
    if method == "pooled":
        assert tight.standard_error <= 0.1 < loose.standard_error <= 0.2
    ratio = tight.batches / loose.batches
    assert 2 < ratio < 8, "half the error takes four times as many"


def test_too_few_batches_are_not_enough() -> None:
    same = conv_input(4)
    report = recalibrate(conv_net(), iter([same] * 20), tolerance=0.5)
    assert report.batches == LEAST_BATCHES


def test_a_tolerance_that_is_not_reached_is_said() -> None:
    report = recalibrate(conv_net(), [conv_input(4, seed=s) for s in range(9)], tolerance=1e-3)
    assert report.batches == 9
    assert report.standard_error is not None
    assert report.standard_error > 1e-3
    assert "standard error" in str(report)


def test_max_batches_reads_no_further() -> None:
    read = []

    def loader() -> Iterator[Tensor]:
        for seed in range(9):
            read.append(seed)
            yield conv_input(4, seed=seed)

    assert recalibrate(conv_net(), loader(), max_batches=3).batches == 3
    assert read == [0, 1, 2]


@pytest.mark.parametrize("options", [{"max_batches": 0}, {"tolerance": 0.0}, {"tolerance": -1.0}])
def test_limits_that_mean_nothing(options: dict[str, float]) -> None:
    with pytest.raises(CalibrationError):
        recalibrate(conv_net(), conv_input(), **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------ progress


@pytest.mark.parametrize("method", ["pooled", "sequential"])
def test_progress_is_told_after_every_batch(method: str) -> None:
    told: list[Progress] = []
    batches = [conv_input(n, seed=n) for n in (5, 4, 2)]
    recalibrate(conv_net(), batches, method=method, progress=told.append)  # type: ignore[arg-type]
    assert [p.batches for p in told] == list(range(1, len(told) + 1))
    assert [p.samples for p in told[:3]] == [5, 9, 11]
    assert told[0].error is None
    assert told[2].error is not None
    assert all(p.layers == 3 for p in told)
    if method == "sequential":
        assert len(told) > 6
        assert told[-1].settled == 3
    assert str(told[2]).startswith("3 batches, 11 samples, standard error 0.")


def test_an_error_in_progress_changes_nothing() -> None:
    net = conv_net()
    before = net[1].running_mean.clone()

    def interrupt(_: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate(net, conv_input(), progress=interrupt)
    assert torch.equal(net[1].running_mean, before)
