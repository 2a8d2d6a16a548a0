"""What programs do between a convolution and a norm, and the blocks that do it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------- what programs do between the two layers

Quirk = Callable[["Block", Tensor, list[Any]], Tensor]
QUIRKS: dict[str, Quirk] = {}


def quirk(run: Quirk) -> Quirk:
    QUIRKS[run.__name__.strip("_")] = run
    return run


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        return z * z

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return 2 * z * dy


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return z

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -dy


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        z.mul_(2)
        ctx.mark_dirty(z)
        return z

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


def _mean_without_gradients(z: Tensor) -> Tensor:
    with torch.no_grad():
        return z.mean()


def _copied(z: Tensor) -> Tensor:
    return torch.empty(z.shape, dtype=z.dtype).copy_(z)


# A second consumer: what it computes is added to the norm's output.
CONSUMERS: dict[str, Callable[[Tensor], Any]] = {
    "add": lambda z: z,
    "product": lambda z: z * z,
    "detach": lambda z: z.detach(),
    "data": lambda z: z.data,
    "mean, no gradients": _mean_without_gradients,
    "view": lambda z: z.view(z.shape),
    "view as": lambda z: z.view_as(z),
    "reshape": lambda z: z.reshape(len(z), -1).sum(1).sum(),
    "slice": lambda z: z[:, :1],
    "row": lambda z: z[0],
    "rows": lambda z: sum(row for row in z),
    "unbind": lambda z: z.unbind(0)[-1],
    "cat": lambda z: torch.cat([z, z], 0)[: len(z)],
    "stack": lambda z: torch.stack([z, -2 * z]).sum(0),
    "relu": lambda z: F.relu(z),
    "where": lambda z: torch.where(z > 0, z, 0.1 * z),
    "einsum": lambda z: torch.einsum("nc...,nc...->n", z, z).sum(),
    "clone": lambda z: z.clone(),
    "copy": _copied,
    "NumPy": lambda z: float(z.detach().numpy().mean()),
    "item": lambda z: z.sum().item(),
    "list": lambda z: sum(z.detach().flatten().tolist()),
    "contiguous": lambda z: float(z.is_contiguous()) + z.stride(0),
    "like": lambda z: torch.ones_like(z) + z.new_zeros(z.shape),
    "cast": lambda z: z.to(torch.float32).to(z.dtype).detach(),
    "function": lambda z: Square.apply(z),
    "reversed": lambda z: Reversed.apply(z),
    "graph": lambda z: float(z.requires_grad) + float(z.grad_fn is not None) + float(z.is_leaf),
    "equal": lambda z: float(torch.equal(z, z)) + len(z) + z.dim() + z.size(1) + z.numel(),
}


@quirk
def consumer_before(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    z = b.conv(x)
    second = CONSUMERS[b.detail](z)
    return b.normalized(z) + second


@quirk
def consumer_after(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    z = b.conv(x)
    y = b.normalized(z)
    return y + CONSUMERS[b.detail](z)


# Something between the two: what it returns is normalised.


def _assigned(z: Tensor) -> Tensor:
    z[:, 0] = 0.5
    return z


def _added(z: Tensor) -> Tensor:
    z += 1
    return z


def _then(write: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def run(z: Tensor) -> Tensor:
        write(z)
        return z

    return run


def _unseen(z: Tensor) -> None:
    with torch.no_grad():
        z.mul_(2)


def _by_numpy(z: Tensor) -> None:
    array = z.detach().numpy()
    array *= 2


def _out(z: Tensor) -> None:
    with torch.no_grad():
        torch.mul(z, 2, out=z)


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda z: F.relu(z),
    "relu_": lambda z: F.relu_(z),
    "relu in place": lambda z: F.relu(z, inplace=True),
    "method relu_": lambda z: z.relu_(),
    "module relu": lambda z: nn.ReLU(inplace=True)(z),
    "add_": lambda z: z.add_(1),
    "+=": _added,
    "[] =": _assigned,
    "write, same name": _then(lambda z: z.mul_(2)),
    "write, no gradients": _then(_unseen),
    "write to out=": _then(_out),
    "write to data": _then(lambda z: z.data.mul_(2)),
    "write to detached": _then(lambda z: z.detach().mul_(2)),
    "write to view": _then(lambda z: z[:, :1].mul_(2)),
    "write to NumPy": _then(_by_numpy),
    "copy_": _then(lambda z: z.copy_(torch.ones_like(z))),
    "detach_": lambda z: z.detach_(),
    "detach": lambda z: z.detach(),
    "view": lambda z: z.view(z.shape),
    "slice": lambda z: z[:],
    "half": lambda z: z[:1],
    "cat": lambda z: torch.cat([z, z[:1]]),
    "clone": lambda z: z.clone(),
    "contiguous": lambda z: z.contiguous(),
    "same dtype": lambda z: z.to(z.dtype),
    "product": lambda z: z * 2,
    "flip": lambda z: z.flip(0),
    "roll": lambda z: z.roll(1, 1),
    "dropout": lambda z: F.dropout(z, 0.5, training=False),
    "identity": lambda z: nn.Identity()(z),
    "function": lambda z: Square.apply(z),
    "reversed": lambda z: Reversed.apply(z),
    "dirty": lambda z: Doubled.apply(z),
    "hook": _then(lambda z: z.register_hook(lambda g: 2 * g) if z.requires_grad else None),
    "retain": _then(lambda z: z.retain_grad() if z.requires_grad else None),
}


@quirk
def between(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    return b.normalized(BETWEEN[b.detail](b.conv(x)))


@quirk
def write_then_use(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    """What was written is seen by the norm and by a second consumer."""
    z = b.conv(x)
    z.add_(1)
    return b.normalized(z) + z


@quirk
def write_after(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    z = b.conv(x)
    y = b.normalized(z.clone())
    z.mul_(3)
    return y + z


@quirk
def returned(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    z = b.conv(x)
    kept.append(z)
    return b.normalized(z)


@quirk
def returned_only(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    return b.conv(x)


@quirk
def stored(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    b.kept = b.conv(x)
    y = b.normalized(b.kept)
    later, b.kept = b.kept, None
    return y + 0.5 * later


@quirk
def two_norms(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    z = b.conv(x)
    return b.normalized(z) + b.normalized(z, b.norm2)


@quirk
def two_norms_apart(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    return b.normalized(b.conv(x)) + b.normalized(b.conv(0.5 * x), b.norm2)


@quirk
def two_norms_in_turn(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    return b.normalized(b.normalized(b.conv(x)), b.norm2)


@quirk
def the_other_norm(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    return b.normalized(b.conv(x), b.norm2)


@quirk
def two_convolutions(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    return b.normalized(b.conv(x)) + b.normalized(b.conv2(x))


@quirk
def crossed(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    """Computed in one order, normalised in the other."""
    z, z2 = b.conv(x), b.conv2(x)
    return b.normalized(z2, b.norm2) - b.normalized(z)


@quirk
def exchanged(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    z, z2 = b.conv(x), b.conv2(x)
    return b.normalized(z2) - b.normalized(z, b.norm2)


@quirk
def sum_of_convolutions(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    return b.normalized(b.conv(x) + b.conv2(x))


@quirk
def twice(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    return b.normalized(b.conv(x)) + b.normalized(b.conv(x.flip(0)))


@quirk
def twice_from_one(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    z = b.conv(x)
    return b.normalized(z) + 2 * b.normalized(z)


@quirk
def all_then_all(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    """Several outputs wait at once, and are used in another order."""
    zs = [b.conv(x), b.conv(2 * x), b.conv(x.flip(0))]
    return sum(i * b.normalized(z) for i, z in enumerate(reversed(zs), 1))


@quirk
def skipped(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    b.conv(x)
    return b.normalized(b.conv(0.3 * x))


@quirk
def functional(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    """The norm's tensors, used by a call that is not its own."""
    norm = b.norm
    args = (norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    z = b.conv(x)
    return F.batch_norm(z if b.arrange != "transpose" else z.mT, *args).view(z.shape)


@quirk
def weight_elsewhere(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    return b.normalized(b.conv(x)) * b.conv.weight.square().mean()


@quirk
def conv_without_gradients(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    with torch.no_grad():
        z = b.conv(x)
    return b.normalized(z)


@quirk
def norm_without_gradients(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    z = b.conv(x)
    with torch.no_grad():
        y = b.normalized(z)
    return y + z.mean()


@quirk
def gradients_switched(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    with torch.no_grad():
        z = b.conv(x)
        with torch.enable_grad():
            y = b.normalized(z) + b.normalized(b.conv(x))
        return torch.cat([y[:1], b.normalized(b.conv(x))[1:]])


@quirk
def autocast_ends_between(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z = b.conv(x)
    return b.normalized(z)


@quirk
def autocast_begins_between(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        z = b.conv(x.to(b.dtype()))
    return b.normalized(z)


@quirk
def checkpointed(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    return checkpoint(lambda x: b.normalized(b.conv(x)), x, use_reentrant=b.reentrant)


@quirk
def checkpointed_conv(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    return b.normalized(checkpoint(b.conv, x, use_reentrant=b.reentrant))


@quirk
def checkpointed_conv_consumer(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    z = checkpoint(b.conv, x, use_reentrant=b.reentrant)
    second = CONSUMERS[b.detail](z)
    return b.normalized(z) + second


@quirk
def checkpointed_norm(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    return checkpoint(b.normalized, b.conv(x), use_reentrant=b.reentrant)


@quirk
def checkpointed_both(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    z = checkpoint(b.conv, x, use_reentrant=b.reentrant)
    return checkpoint(b.normalized, z, use_reentrant=b.reentrant)


@quirk
def checkpointed_norm_consumer(b: Block, x: Tensor, kept: list[Any]) -> Tensor:
    z = b.conv(x)
    return checkpoint(b.normalized, z, use_reentrant=b.reentrant) + CONSUMERS[b.detail](z)


class Block(nn.Module):
    """A convolution and a norm, and what is unusual about them: always, later, or in the example.

    Args:
        layers: conv, norm, and where the quirk needs them conv2, norm2.
        quirk: What is done between the two; "" for nothing.
        detail: Which of its kind.
        when: "always", "later" (not on the example), "example" (nowhere else).
        arrange: What brings channels to where the norm has them.
        reentrant: The checkpoint's.
    """

    def __init__(
        self,
        layers: dict[str, nn.Module],
        quirk: str,
        detail: str,
        when: str,
        arrange: str,
        reentrant: bool,
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.quirk, self.detail, self.when = quirk, detail, when
        self.arrange, self.reentrant = arrange, reentrant
        self.kept: Any = None

    def dtype(self) -> torch.dtype:
        return self.norm.running_mean.dtype

    def normalized(self, z: Tensor, norm: nn.Module | None = None) -> Tensor:
        norm = self.norm if norm is None else norm
        if self.arrange == "transpose":
            return norm(z.transpose(1, 2)).transpose(1, 2)
        if self.arrange == "flatten":
            return norm(z.flatten(0, 1)).view(z.shape)
        return norm(z)

    def forward(self, x: Tensor, later: bool, kept: list[Any]) -> Tensor:
        if self.quirk and (self.when == "always" or later == (self.when == "later")):
            return QUIRKS[self.quirk](self, x, kept)
        return self.normalized(self.conv(x))

    def extra_repr(self) -> str:
        return f"{self.quirk} {self.detail!r} {self.when} {self.arrange} {self.reentrant}"


class Net(nn.Module):
    """Blocks, with an activation after each."""

    def __init__(self, blocks: list[Block], activations: list[str]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.activations = activations

    def forward(self, x: Tensor, later: bool = False) -> list[Tensor]:
        kept: list[Tensor] = []
        for block, activation in zip(self.blocks, self.activations, strict=True):
            y = block(x, later, kept)
            if activation == "relu_":
                y = F.relu_(y)
            elif activation:
                y = getattr(torch, activation)(y)
            x = y + x if y.shape == x.shape and y.dtype == x.dtype else y
        return [x, *kept]
