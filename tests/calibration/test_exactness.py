"""Promise 8: each layer has the float64 pooled moments of what it received."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from calibration.received import assert_exact, assert_statistics, recording
from stillnorm import recalibrate
from support.layers import conv_net
from support.oracles import pooled_moments


def mlp(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 5), nn.ReLU(), nn.BatchNorm1d(5), nn.Linear(5, 4),
        nn.BatchNorm1d(4, affine=False),
    ).to(dtype)  # fmt: skip


def rows(n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g) * torch.linspace(0.1, 3, 6) + torch.arange(6.0)


@settings(max_examples=40)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=6), st.integers(0, 99))
def test_any_ragged_split(sizes: list[int], seed: int) -> None:
    net = mlp()
    with recording(net) as received:
        recalibrate(net, [(rows(n, seed + i), None) for i, n in enumerate(sizes)])
    assert_exact(received)


@given(st.permutations(range(5)))
@settings(max_examples=20)
def test_the_order_of_the_batches_does_not_matter(order: list[int]) -> None:
    batches = [rows(n, seed=n) for n in (16, 1, 7, 33, 2)]
    net, shuffled = mlp(), mlp()
    recalibrate(net, batches)
    recalibrate(shuffled, [batches[i] for i in order])
    for a, b in zip(net.buffers(), shuffled.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


KINDS = {
    "BatchNorm1d rows": (nn.BatchNorm1d, (4,)),
    "BatchNorm1d": (nn.BatchNorm1d, (4, 9)),
    "BatchNorm2d": (nn.BatchNorm2d, (4, 7, 8)),
    "BatchNorm3d": (nn.BatchNorm3d, (4, 3, 5, 4)),
    "SyncBatchNorm without a process group": (nn.SyncBatchNorm, (4, 7, 8)),
}


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize(("kind", "shape"), KINDS.values(), ids=KINDS)
def test_every_rank_and_dtype(
    kind: type[nn.Module], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = kind(4).to(dtype)
    inputs = [(3 * torch.randn(n, *shape) - 1).to(dtype) for n in (8, 5, 2)]
    recalibrate(layer, inputs)
    assert_statistics(layer, *pooled_moments(inputs))
    assert layer.running_mean.dtype == dtype


def test_half_activations_in_a_float32_layer_are_not_rounded_on_the_way() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with torch.autocast("cpu", torch.bfloat16), recording(net) as received:
        recalibrate(net, [torch.randn(n, 3, 9, 9) for n in (4, 3)])
    assert received[net[1]][0].dtype == torch.bfloat16
    assert_exact(received)


@pytest.mark.parametrize("ratio", [1e1, 1e2, 1e3, 1e4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_mean_of_many_deviations(ratio: float, layout: torch.memory_format) -> None:
    layer = nn.BatchNorm2d(16)
    inputs = [(torch.randn(n, 16, 12, 12) + ratio).contiguous(memory_format=layout) for n in (8, 3)]
    recalibrate(layer, inputs)
    assert_statistics(layer, *pooled_moments(inputs))


@pytest.mark.parametrize("ratio", [0.0, 4.0, 7.0, 20.0, 100.0])
def test_batches_sorted_by_class(ratio: float) -> None:
    # Between-batch spread beside a large mean: where a mean rounded to float32 costs most.
    layer = nn.BatchNorm2d(64)
    inputs = [torch.randn(4, 64, 8, 8) + ratio + 2 * (i % 2) for i in range(8)]
    recalibrate(layer, inputs)
    assert_statistics(layer, *pooled_moments(inputs))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_many_values(layout: torch.memory_format) -> None:
    # torch's own channels_last statistics are 1.5e-4 off here.
    layer = nn.BatchNorm2d(4).to(memory_format=layout)
    x = (torch.randn(16, 4, 160, 160) + 1).contiguous(memory_format=layout)
    recalibrate(layer, x)
    assert_statistics(layer, *pooled_moments([x]))


def test_many_rows() -> None:
    layer, x = nn.BatchNorm1d(4), torch.randn(100_000, 4) + 3
    recalibrate(layer, x)
    assert_statistics(layer, *pooled_moments([x]))


def test_batches_of_different_spatial_size() -> None:
    net = conv_net()[:4]
    with recording(net) as received:
        recalibrate(net, iter([torch.randn(4, 3, s, s) for s in (6, 9, 14)]))
    assert_exact(received)


def test_one_value_per_channel_counts_and_is_passed_on_by_the_statistics_there_are() -> None:
    net = mlp().train()
    alone = rows(1, seed=5)
    passed = net.eval()(alone)
    outputs = []
    net.register_forward_hook(lambda *args: outputs.append(args[2]))
    with recording(net) as received:
        report = recalibrate(net, [rows(16), rows(9, 1), alone])
    assert [len(x) for x in received[net[0]]] == [16, 9, 1]
    assert_exact(received)
    assert report.layers[0].count == report.layers[0].samples == 26
    assert torch.equal(outputs[-1], passed)


def test_an_empty_batch_counts_for_nothing() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    x = torch.randn(4, 3, 5, 5)
    recalibrate(net, iter([x[:0], x, x[:0]]))
    assert_statistics(net[0], *pooled_moments([x]))
    empty = nn.BatchNorm2d(3)
    assert recalibrate(empty, x[:0]).refused[0][0] == ""
    assert empty.running_var.tolist() == [1, 1, 1]


def test_a_constant_channel_has_variance_zero() -> None:
    layer = nn.BatchNorm2d(2)
    x = torch.randn(4, 2, 5, 5)
    x[:, 1] = 7.25
    recalibrate(layer, [x, x[:2]])
    assert layer.running_mean[1] == 7.25
    assert layer.running_var[1] == 0


def test_shared_layers_are_pooled_over_their_places() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)
            self.alias = self.norm
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(4 * self.conv(self.norm(x)) + 3)

    net = Shared()
    with recording(net) as received:
        report = recalibrate(net, [torch.randn(n, 3, 5, 5) for n in (4, 2)])
    assert len(received[net.norm]) == 4
    assert_exact(received)
    (layer,) = report.layers
    assert layer.paths == ("norm", "alias")
    assert layer.count == 2 * 6 * 25
    assert net.norm.num_batches_tracked == 4, "as torch counts"


def test_instance_norm_averages_samples_as_torch_does() -> None:
    layer = nn.InstanceNorm2d(3, track_running_stats=True)
    inputs = [torch.randn(n, 3, s, s) * 2 + n for n, s in ((4, 6), (1, 9), (2, 5))]
    report = recalibrate(layer, iter(inputs))
    flat = [sample.double().flatten(1) for x in inputs for sample in x]
    mean = torch.stack([f.mean(1) for f in flat]).mean(0)
    var = torch.stack([f.var(1) for f in flat]).mean(0)
    assert_statistics(layer, mean, var)
    assert report.layers[0].count == 7
    assert layer.num_batches_tracked == 0, "torch's instance norm never counts"


def test_a_momentum_of_one_over_one_batch_is_the_same_thing() -> None:
    net, torchs = conv_net(), conv_net().train()
    x = torch.randn(8, 3, 6, 6)
    for layer in torchs.modules():
        if hasattr(layer, "momentum"):
            layer.momentum = 1.0
    torchs(x)
    recalibrate(net, x)
    for a, b in zip(net.buffers(), torchs.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_time_changes_nothing() -> None:
    net, batches = conv_net(), [torch.randn(n, 3, 6, 6) for n in (8, 3)]
    recalibrate(net, batches)
    once = {name: b.clone() for name, b in net.named_buffers()}
    recalibrate(net, batches)
    for name, buffer in net.named_buffers():
        if "num_batches" not in name:
            assert torch.equal(buffer, once[name])
