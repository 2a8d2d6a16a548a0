"""Random layers for random networks: convolutions and norms of torch and of users."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

T = TypeVar("T")


class Choices:
    """A source of choices: each is one of n."""

    def __init__(self, choose: Callable[[int], int]) -> None:
        self._choose = choose
        self.made: list[int] = []

    def of(self, options: Sequence[T]) -> T:
        self.made.append(self._choose(len(options)))
        return options[self.made[-1]]

    def rarely(self, n: int) -> bool:
        """Once in n times."""
        return self.of(range(n)) == n - 1

    def again(self) -> Choices:
        """The same choices once more."""
        made = iter(self.made)
        return Choices(lambda n: next(made))


# ------------------------------------------------------------------------ convolutions of users

CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class Padded(nn.Module):
    """Pads one side by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, [0, 1] * (x.dim() - 2)))


class Standardized(nn.Module):
    """Standardises its weight."""

    def forward(self, x: Tensor) -> Tensor:
        over = tuple(range(1, x.dim()))
        w = self.weight - self.weight.mean(over, keepdim=True)
        w = w / (w.square().mean(over, keepdim=True) + 1e-3).sqrt()
        settings = (self.stride, self.padding, self.dilation, self.groups)
        return CONVOLVE[x.dim() - 2](x, w, self.bias, *settings)


class Keyword(nn.Module):
    """Calls by keywords, and leaves out what is the default."""

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        given = {} if self.bias is None else {"bias": self.bias}
        convolve = CONVOLVE[x.dim() - 2]
        return convolve(
            input=x * scale,
            groups=self.groups,
            weight=self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            **given,
        )


class Inner(nn.Module):
    """Overrides the step below forward."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 0.5, bias)


class Scaled(nn.Module):
    """Goes on computing after it has convolved."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Summed(nn.Module):
    """Convolves twice in one call."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + super().forward(x.flip(0))


class Rectified(nn.Module):
    """Writes into its output."""

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(super().forward(x), 0.3, inplace=True)


class Silent(nn.Module):
    """Convolves without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


class Adapted(nn.Linear):
    """A linear layer with a low-rank branch beside it."""

    def __init__(self, c_in: int, c_out: int, bias: bool = True) -> None:
        super().__init__(c_in, c_out, bias)
        self.down = nn.Parameter(torch.randn(2, c_in))
        self.up = nn.Parameter(torch.randn(c_out, 2))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.down), self.up)


class Named(nn.Linear):
    """A linear layer that calls by keywords."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(weight=self.weight, input=x, bias=self.bias)


# ------------------------------------------------------------------------------- norms of users


def _own_call(norm: Any, x: Tensor, weight: Tensor | None) -> Tensor:
    mean, var, training = norm.running_mean, norm.running_var, norm.training
    return F.batch_norm(x, mean, var, weight, norm.bias, training, norm.momentum or 0.0, norm.eps)


class Act(nn.Module):
    """Norm and activation in one layer, as timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(_own_call(self, x, self.weight))


class Gated(nn.Module):
    """Computes its scale from a parameter that is no affine."""

    def __init__(self, channels: int, **options: Any) -> None:
        super().__init__(channels, **options)
        self.gate = nn.Parameter(torch.linspace(-0.5, 1.5, channels))

    def forward(self, x: Tensor) -> Tensor:
        return _own_call(self, x, self.gate if self.weight is None else self.weight * self.gate)


class Super(nn.Module):
    """Calls torch's forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Residual(nn.Module):
    """Uses its input after the norm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Before(nn.Module):
    """Computes before it normalises."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(x))


class Twofold(nn.Module):
    """Normalises twice."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Formula(nn.Module):
    """Never calls torch's batch norm in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.dim() - 2)
        y = (x - self.running_mean.view(shape)) / (self.running_var.view(shape) + self.eps).sqrt()
        return y if self.weight is None else y * self.weight.view(shape) + self.bias.view(shape)


CONVOLUTIONS = (Padded, Standardized, Keyword, Inner, Scaled, Summed, Rectified, Silent)
NORMS = (Act, Gated, Super, Residual, Before, Twofold, Formula)


def _made(mixin: type, base: type) -> None:
    """Make a class that pickle finds."""
    name = f"{mixin.__name__}{base.__name__}"
    globals()[name] = type(name, (mixin, base), {"__module__": __name__, "__qualname__": name})


for _mixin in CONVOLUTIONS:
    for _base in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        _made(_mixin, _base)
for _mixin in NORMS:
    for _base in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        _made(_mixin, _base)


def user_class(mixin: type, base: str) -> Any:
    return globals()[f"{mixin.__name__}{base}"]


# ---------------------------------------------------------------------------------- the layers


def make_convolution(pick: Choices, rank: int, c_in: int, c_out: int, size: list[int]) -> Any:
    """A layer from c_in to c_out channels that gives no map too small or too large."""
    bias = not pick.rarely(2)
    if rank <= 0:
        return pick.of((nn.Linear, Named, Adapted))(c_in, c_out, bias=bias)
    groups = pick.of([g for g in (1, 2, c_in) if c_in % g == 0 == c_out % g])
    options: dict[str, Any] = {
        "kernel_size": pick.of((1, 3, 2)),
        "stride": pick.of((1, 1, 2)),
        "groups": groups,
        "bias": bias,
        "dilation": pick.of((1, 1, 1, 2)),
    }
    family = pick.of(("torch", "torch", "transposed", "user"))
    if family == "transposed":
        options["padding"] = pick.of((0, 1))
        options["output_padding"] = pick.of((0, 1)) if options["stride"] == 2 else 0
        kind = getattr(nn, f"ConvTranspose{rank}d")
    elif family == "user":
        options["padding"] = pick.of((1, 0, "valid"))
        kind = user_class(pick.of(CONVOLUTIONS), f"Conv{rank}d")
    else:
        options["padding"] = pick.of((1, 0, "same", "valid", 2))
        options["padding_mode"] = pick.of(("zeros", "zeros", "reflect", "circular", "replicate"))
        if options["padding"] == "same":
            options["stride"] = 1
        kind = getattr(nn, f"Conv{rank}d")
    conv = kind(c_in, c_out, **options)
    if not fits(conv, c_in, size):
        conv = kind(c_in, c_out, 1, groups=groups, bias=bias)
    return conv


def fits(conv: nn.Module, c_in: int, size: list[int]) -> bool:
    try:
        with torch.no_grad():
            y = conv(torch.zeros(1, c_in, *size))
    except RuntimeError:
        return False
    return all(2 <= n <= 8 for n in y.shape[2:])


def make_norm(pick: Choices, rank: int, channels: int) -> Any:
    name = f"BatchNorm{max(rank, 1)}d"
    options: dict[str, Any] = {
        "affine": not pick.rarely(5),
        "eps": pick.of((1e-5, 1e-3, 0.3)),
        "momentum": pick.of((0.1, 0.1, None, 0.0)),
    }
    family = pick.of(("torch", "torch", "user", "sync", "instance"))
    if family == "user":
        return user_class(pick.of(NORMS), name)(channels, **options)
    if family == "sync":
        return nn.SyncBatchNorm(channels, **options)
    if family == "instance" and rank > 0:
        kind = getattr(nn, f"InstanceNorm{rank}d")
        return kind(channels, track_running_stats=True, **options)
    return getattr(nn, name)(channels, **options)


@torch.no_grad()
def settle(net: nn.Module) -> None:
    """Statistics and affine away from the initial ones, with zeros and negative scales."""
    for layer in net.modules():
        if getattr(layer, "running_mean", None) is None:
            continue
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.3, 2.3)
        layer.num_batches_tracked.fill_(7)
        if layer.weight is not None:
            layer.weight.normal_()
            layer.weight[torch.randint(0, 2 * len(layer.weight), (1,)) % len(layer.weight)] *= 0
            layer.bias.normal_()
