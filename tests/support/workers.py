"""What the processes of the distributed tests do; each function runs on every rank.

They live here because a spawned process must find them by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import stillnorm as sn
from stillnorm.norms import find_norms, probe_modes
from support import layers
from support.fingerprint import bits


def tensors(net: nn.Module) -> dict[str, Tensor]:
    """Everything that a norm layer has, by the clean path."""
    return {
        f"{norm.path}.{key}": tensor.detach().clone()
        for norm in find_norms(net)
        for key, tensor in norm.tensors().items()
    }


def _net() -> nn.Module:
    net = layers.conv_net()
    net.append(nn.Unflatten(1, (5, 1, 1))).append(nn.Conv2d(5, 4, 1))
    return net.append(layers.make("own F.batch_norm"))


def _train(net: nn.Module, rank: int, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, weight_decay=0.1)
    for seed in range(steps):
        net.train()
        optimizer.zero_grad(set_to_none=False)
        net(layers.conv_input(seed=10 * rank + seed)).square().mean().backward()
        optimizer.step()


def ddp(rank: int) -> dict[str, Any]:
    """Frozen before the wrap, both ways; trained; compared."""
    seen: dict[str, Any] = {}
    for affine in ("frozen", "trains"):
        for static_graph in (False, True):
            net = _net()
            sn.freeze(net, affine=affine)
            before = tensors(net)
            wrapped = DistributedDataParallel(net, static_graph=static_graph)
            _train(wrapped, rank)
            after = tensors(wrapped)
            seen[f"{affine} {static_graph}"] = {
                "same": [k for k in before if bits(before[k]) == bits(after[k])],
                "moved": [k for k in before if bits(before[k]) != bits(after[k])],
                "frozen": sn.is_frozen(wrapped),
                "held by": [probe_modes(wrapped).held_by(norm) for norm in find_norms(wrapped)],
                "after": after,
                "conv": net[0].weight.detach().clone(),
            }
    return seen


def ddp_refusals(rank: int) -> dict[str, Any]:
    """Inside the wrap: what the reducer would not survive is refused."""
    seen: dict[str, Any] = {}
    live = DistributedDataParallel(_net())
    seen["freeze inside"] = sn.freeze(live).refused
    seen["still live"] = not any(norm.hold for norm in find_norms(live))
    seen["trains inside"] = sn.freeze(live, affine="trains").refused
    _train(live, rank)
    seen["unfreeze what learns"] = sn.unfreeze(live).refused
    unused = DistributedDataParallel(_net(), find_unused_parameters=True)
    seen["find_unused_parameters"] = sn.freeze(unused).refused
    _train(unused, rank)
    net = _net()
    sn.freeze(net)
    held = DistributedDataParallel(net)
    seen["unfreeze inside"] = sn.unfreeze(held).refused
    seen["learn again inside"] = sn.freeze(held, affine="trains").refused
    _train(held, rank)
    seen["unfreeze outside"] = sn.unfreeze(held.module).refused
    return seen


def fsdp2(rank: int) -> dict[str, Any]:
    """Sharded after and before freezing; layers sharded on their own change their class."""
    from torch.distributed.fsdp import fully_shard

    def full(net: nn.Module) -> dict[str, Tensor]:
        return {
            k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in tensors(net).items()
        }

    seen: dict[str, Any] = {}
    for order in ("freeze first", "shard first"):
        net = _net()
        if order == "freeze first":
            sn.freeze(net)
        fully_shard(net[1])
        fully_shard(net[3])
        fully_shard(net)
        if order == "shard first":
            sn.freeze(net)
        before = {k: bits(t) for k, t in full(net).items()}
        conv = net[0].weight.full_tensor()
        _train(net, rank)
        seen[order] = {
            "frozen": sn.is_frozen(net),
            "same": {k: bits(t) for k, t in full(net).items()} == before,
            "learned": not torch.equal(net[0].weight.full_tensor(), conv),
            "classes": [type(norm.module).__name__ for norm in find_norms(net)],
            "refused": sn.unfreeze(net).refused,
        }
    return seen


def folding(rank: int) -> dict[str, Any]:
    """Norms computed in their convolutions, under DDP and FSDP2, beside the same without folding.

    One unit around both, and units that part a convolution from its norm: its weight is gone by
    then, and it convolves at once.
    """
    from torch.distributed.fsdp import fully_shard

    def frozen(fold: bool) -> nn.Module:
        net = layers.conv_net()
        options = {"fold_on": layers.conv_input(), "fold_when": "always"} if fold else {}
        sn.freeze(net, affine="trains", **options)  # type: ignore[arg-type]
        return net

    def shard_around(net: nn.Module) -> nn.Module:
        fully_shard(net[3])
        return fully_shard(net)

    def shard_apart(net: nn.Module) -> nn.Module:
        fully_shard(net[0])
        fully_shard(net[3][1])
        return fully_shard(net)

    def shard_first(net: nn.Module) -> nn.Module:
        sn.unfreeze(net)
        fully_shard(net[0])
        fully_shard(net)
        seen["refused"] = dict(
            sn.freeze(
                net, affine="trains", fold_on=layers.conv_input(), fold_when="always"
            ).not_folded
        )
        return net

    def full(net: nn.Module) -> dict[str, Tensor]:
        state = {n.replace("module.", ""): t.detach() for n, t in net.named_parameters()}
        return {
            k: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for k, t in state.items()
        }

    seen: dict[str, Any] = {}
    plain = DistributedDataParallel(frozen(False))
    _train(plain, rank)
    expected = full(plain)
    for name, wrap in (
        ("ddp", DistributedDataParallel),
        ("fsdp2 around", shard_around),
        ("fsdp2 apart", shard_apart),
        ("fsdp2 first", shard_first),
    ):
        net = wrap(frozen(True))
        _train(net, rank)
        found = full(net)
        seen[name] = max(float((found[k] - expected[k]).abs().max()) for k in expected)
    return seen


def split(rank: int) -> dict[str, Any]:
    """A split norm under DistributedDataParallel, in both modes of the reducer."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(3 * self.conv(self.norm(x)).relu() + 1)

    seen: dict[str, Any] = {}
    for static_graph in (False, True):
        net = Twice()
        sn.split_shared(net, layers.conv_input(8))
        wrapped = DistributedDataParallel(net, static_graph=static_graph)
        seen["refused"] = _outcome(lambda: sn.split_shared(wrapped, layers.conv_input(8)))  # noqa: B023
        _train(wrapped, rank)
        seen[f"static_graph={static_graph}"] = {
            name: tensor.detach().clone() for name, tensor in net.state_dict().items()
        }
    return seen


def sync_batch_norm(rank: int) -> dict[str, Any]:
    """A held SyncBatchNorm talks to no other rank; conversion of a held layer undoes the hold."""
    layer = layers.make("sync")
    x = layers.example("sync", seed=rank)
    expected = layer.eval()(x)
    sn.freeze(layer)
    before = tensors(layer)
    layer.train()
    if rank == 0:  # a collective call would hang here
        assert torch.equal(layer(x), expected)
    after = tensors(layer)
    return {"same": all(bits(before[k]) == bits(after[k]) for k in before)}


def everything(rank: int) -> dict[str, Any]:
    """All of them in one pair of processes: starting them is what takes time."""
    return {
        work.__name__: work(rank)
        for work in (ddp, ddp_refusals, fsdp2, folding, split, sync_batch_norm)
    }


# What each rank of two, and of three, has; by rank, the indices of the batches.
SHARDS = {2: ((0, 1, 2, 3), (4,)), 3: ((0, 2, 4), (), (1, 3))}


def ragged_batches() -> list[Tensor]:
    """Five batches of different sizes and levels."""
    return [layers.conv_input(n, seed=n) * n + n for n in (7, 2, 5, 3, 6)]


def _outcome(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def recalibrating(rank: int) -> dict[str, Any]:
    """Each rank its shard: uneven ones, an empty one, one that fails, wrapped models."""
    size = dist.get_world_size()
    everything = ragged_batches()
    mine = [everything[i] for i in SHARDS[size][rank]]
    seen: dict[str, Any] = {}
    for method in ("pooled", "sequential"):
        net, wrapped = layers.conv_net(), DistributedDataParallel(layers.conv_net())
        with counted_collectives() as calls:
            report = sn.recalibrate(net, mine, method=method)  # type: ignore[arg-type]
        sn.recalibrate(wrapped, mine, method=method)  # type: ignore[arg-type]
        errors = [layer.standard_error for layer in report.layers]
        seen[method] = {
            "state": tensors(net),
            "wrapped": tensors(wrapped),
            "report": (report.batches, report.samples, [layer.count for layer in report.layers]),
            "errors": errors,
            "collectives": len(calls),
        }
        bad = [x.clone() for x in mine]
        if rank == 0:
            bad[1][0, 0, 0, 0] = float("nan")
        before = {k: bits(t) for k, t in tensors(net).items()}
        seen[method]["failed"] = _outcome(lambda: sn.recalibrate(net, bad, method=method))  # noqa: B023
        seen[method]["untouched"] = before == {k: bits(t) for k, t in tensors(net).items()}
    net = layers.conv_net()
    seen["nothing"] = _outcome(lambda: sn.recalibrate(net, []))
    wrapped = DistributedDataParallel(net)
    if rank == 0:  # the others do not take part: waiting for them would hang
        alone = layers.conv_net()
        sn.recalibrate(alone, everything, group="self")
        seen["alone"] = tensors(alone)
        seen["checked"] = len(sn.inspect(wrapped, everything[0]).layers)
        sn.check(wrapped, everything)
    group = dist.new_group([0, size - 1])
    if rank in (0, size - 1):
        part = layers.conv_net()
        sn.recalibrate(part, everything[:2] if rank == 0 else everything[2:], group=group)
        seen["part"] = tensors(part)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(layers.conv_net())
    sn.recalibrate(synced, mine)
    seen["synced"] = tensors(synced)
    seen["sharded"] = _sharded([everything[rank], everything[rank + 1]])
    return seen


def _sharded(batches: list[Tensor]) -> dict[str, Any]:
    from torch.distributed.fsdp import fully_shard

    net = layers.conv_net()
    fully_shard(net[3])
    fully_shard(net)
    before = {name: bits(buffer) for name, buffer in net.named_buffers()}
    refused = _outcome(lambda: sn.recalibrate(net, batches, method="sequential"))
    same = before == {name: bits(buffer) for name, buffer in net.named_buffers()}
    sn.recalibrate(net, batches)
    return {
        "refused": refused if same else "changed",
        "state": {name: buffer.clone() for name, buffer in net.named_buffers()},
    }


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[None]]:
    """Count the collective calls that are made inside the block."""
    calls: list[None] = []
    names = ("all_gather", "all_reduce", "broadcast", "barrier", "all_gather_object")
    real = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(None)
            return real[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name in names:
            setattr(dist, name, real[name])


def diverged(rank: int) -> dict[str, Any]:
    """SN501: what two ranks find when both check, what pooling leaves, and who waits for whom."""
    every = dist.group.WORLD

    def net(seed: int = 0, steps: int = 0, shift: float = 0.0) -> nn.Module:
        torch.manual_seed(0)
        made = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        made.append(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)).train()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            made(torch.randn(8, 3, 4, 4, generator=generator) + shift)
        return made

    def found(model: nn.Module, **options: Any) -> Any:
        report = sn.check(model, select="SN501", group=every, **options)
        assert not report.crashed, report.crashed
        return report

    def outcome(model: nn.Module) -> Any:
        report = found(model)
        if report.not_run:
            return report.not_run[0].reason
        return [(f.severity, f.paths, dict(f.evidence)) for f in report.findings]

    seen: dict[str, Any] = {"equal": outcome(net(steps=3))}
    own = net(seed=rank, steps=3, shift=float(rank))
    before = tensors(own)
    report = found(own)
    seen["own"] = [(f.severity, f.paths, dict(f.evidence)) for f in report.findings]
    seen["message"] = report.findings[0].message
    seen["left"] = {k: bits(t) for k, t in tensors(own).items()} == {
        k: bits(t) for k, t in before.items()
    }
    seen["before"] = before
    fixed = report.fix(unsafe=True)
    seen["pooled"] = tensors(own)
    seen["after"] = outcome(own)
    fixed.undo()
    seen["undone"] = {k: bits(t) for k, t in tensors(own).items()} == {
        k: bits(t) for k, t in before.items()
    }

    rounded = net(steps=3)
    rounded[1].running_mean.mul_(1 + 1e-6 * rank)
    rounded[1].running_var.mul_(1 + 1e-6 * rank)
    seen["rounding"] = outcome(rounded)
    seen["half"] = outcome(net(steps=3).bfloat16())
    seen["sync"] = outcome(nn.SyncBatchNorm.convert_sync_batchnorm(net(steps=3)))
    held = net(steps=3)
    sn.freeze(held)
    seen["held"] = outcome(held)
    held[1].running_mean.add_(rank)
    seen["held apart"] = outcome(held)
    seen["no statistics"] = outcome(nn.BatchNorm1d(2, track_running_stats=False))
    seen["lazy"] = outcome(nn.LazyBatchNorm1d())
    seen["meta"] = outcome(nn.BatchNorm1d(2, device="meta"))

    poisoned = net(steps=3)
    poisoned[1].running_var[0] = float("nan") if rank == 1 else 1.0
    report = found(poisoned)
    seen["one NaN"] = [(f.paths, f.fix) for f in report.findings]
    poisoned[1].running_var[0] = float("nan")
    seen["both NaN"] = outcome(poisoned)

    for name, shift in (("broadcast", 0.0), ("broadcast, far", 30.0 * rank)):
        wrapped = DistributedDataParallel(net())
        generator = torch.Generator().manual_seed(rank)
        wrapped(torch.randn(64, 3, 8, 8, generator=generator) + shift).sum().backward()
        seen[name] = outcome(wrapped)
    quiet = DistributedDataParallel(net(), broadcast_buffers=False)
    quiet(torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(rank))).sum().backward()
    seen["no broadcast"] = outcome(quiet)

    seen["other model"] = outcome(nn.BatchNorm1d(2 + rank))
    if rank == 0:  # the other rank does not check: nobody waits for it
        seen["alone"] = sn.check(net(), select="SN501").not_run[0].reason
    try:
        found(net(), batches=[torch.randn(4, 3, 4, 4) if rank == 0 else torch.randn(4, 9)])
        seen["a batch that fails on rank 1"] = "done"
    except sn.errors.BatchError:
        seen["a batch that fails on rank 1"] = "raised"

    from stillnorm.diagnosis.evidence import peers

    kept = peers._statistics
    if rank == 1:
        peers._statistics = lambda layers: torch.ones(1) / 0 + [][0]
    try:
        seen["rank 1 fails"] = outcome(net())
    except IndexError:
        seen["rank 1 fails"] = "raised"
    peers._statistics = kept
    return seen
