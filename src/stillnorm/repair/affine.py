"""A batch norm in eval mode: a scale and a shift for each channel; and what computes the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillnorm.errors import StateError
from stillnorm.norms import NormLayer

# Roundings of each term on either side, and the slope of an activation, in eps of the dtype.
_ROUNDINGS = 16

_BEFORE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


class AffineNorm(nn.Module):
    r"""The eval function of a batch norm, in both modes and without statistics.

    .. math:: y = x \cdot \text{scale} + \text{shift}

    Half precision is computed in float32, and y has the dtype of x, as in `F.batch_norm`. Scale and
    shift are parameters under names of their own: a checkpoint of the batch norm is converted as it
    loads, and can never be taken for one of this.

    Args:
        scale: weight / sqrt(running_var + eps).
        shift: bias - running_mean * scale.
        eps: The eps that is in them, for checkpoints of the batch norm.

    Shape:
        - x, y: ``(N, C, *)``; scale, shift: ``(C,)``.

    Cost:
        One read and one write of x; saves x for backward where the scale learns, else nothing.
    """

    def __init__(self, scale: Tensor, shift: Tensor, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.scale, self.shift = nn.Parameter(scale), nn.Parameter(shift)
        self.drop, self.act = nn.Identity(), nn.Identity()  # timm's, where its layer had them

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        if x.dim() < 2 or x.shape[1] != len(self.scale):
            raise ValueError(f"expected (N, {len(self.scale)}, *), got {x.shape}")
        half = x.dtype == torch.float16 or x.dtype == torch.bfloat16
        dtype = torch.float32 if half else x.dtype
        shape = [-1] + [1] * (x.dim() - 2)
        scale, shift = self.scale.to(dtype).view(shape), self.shift.to(dtype).view(shape)
        y = torch.addcmul(shift, x.to(dtype), scale).to(x.dtype)
        return self.act(self.drop(y))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """Say how many channels there are."""
        return f"{len(self.scale)}"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Take the checkpoint of the batch norm, too."""
        if f"{prefix}running_var" in state_dict:
            weight, bias, mean, var, _ = (state_dict.pop(prefix + name, None) for name in _BEFORE)
            both = scale_and_shift(weight, bias, mean, var, self.eps)
            state_dict[f"{prefix}scale"], state_dict[f"{prefix}shift"] = both
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def scale_and_shift(
    weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute the two vectors in float64, each rounded once.

    s = weight / sqrt(var + eps),  t = bias - mean * s

    Shape:
        - all: ``(C,)``.
    """

    def exact(tensor: Tensor) -> Tensor:
        # On the host: not every device has float64.
        return tensor.detach().to("meta" if tensor.is_meta else "cpu").double()

    scale = (exact(var) + eps).rsqrt()
    if weight is not None:
        scale = scale * exact(weight)
    shift = -exact(mean) * scale
    if bias is not None:
        shift = shift + exact(bias)
    return scale.to(var.device, var.dtype), shift.to(var.device, var.dtype)


# ---------------------------------------------------------------------- what computes the same


def must_agree(layer: NormLayer, new: nn.Module) -> None:
    """Raise where the two differ by more than their roundings, on an input of the layer's scale.

    Hooks are left out; modes and random states stay.

    Raises:
        StateError: They differ.
    """
    if any(tensor.is_meta for tensor in layer.tensors().values()):
        return
    x = _probe(layer, new)
    before, after = _eval_output(layer.module, x), _eval_output(new, x)
    apart = (before.double() - after.double()).abs()
    same = (apart <= _bound(layer, x)) | (before == after) | (before.isnan() & after.isnan())
    if not bool(same.all()):
        raise StateError(
            f"{layer.path}: {type(new).__name__} in its place computes something else in eval "
            f"mode, by {float(apart.nan_to_num(torch.inf).max()):.2g}",
            help="its forward does more than normalise (give a callable), or its dtype cannot hold "
            "scale and shift (cast first, then replace); nothing was changed",
        )


def _probe(layer: NormLayer, new: nn.Module) -> Tensor:
    """Return a small input with the layer's own mean and variance, where it has them.

    Shape:
        ``(4, C)``, or ``(4, C, 3, ...)`` with the dimensions that the layer takes.
    """
    ends = (layer.module, new)  # a SyncBatchNorm takes any
    flat, deep = (
        any(isinstance(m, kind) for m in ends) for kind in (nn.BatchNorm1d, nn.BatchNorm3d)
    )
    shape = (4, layer.num_features, *[3] * (0 if flat else 3 if deep else 2))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    like = next((t for t in layer.tensors().values() if t.is_floating_point()), x)
    x = x.to(like)
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        return x
    return x * _along(var + layer.eps, x).sqrt() + _along(mean, x)


def _bound(layer: NormLayer, x: Tensor) -> Tensor:
    """Return how far roundings can move the output: (|x| + |mean|) |s| + |bias| times eps."""
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None:
        return x.double().new_zeros(())  # torch's own operator on both sides
    weight = 1.0 if layer.weight is None else _along(layer.weight, x).double().abs()
    bias = 0.0 if layer.bias is None else _along(layer.bias, x).double().abs()
    s = weight / (_along(var, x).double() + layer.eps).sqrt()
    size = (x.double().abs() + _along(mean, x).double().abs()) * s + bias
    return _ROUNDINGS * torch.finfo(x.dtype).eps * size


def _along(vector: Tensor, x: Tensor) -> Tensor:
    return vector.detach().view(1, -1, *[1] * (x.dim() - 2))


@torch.no_grad()
def _eval_output(module: nn.Module, x: Tensor) -> Tensor:
    output: Tensor = _in_eval(module).forward(x.clone())  # activations may be in place
    return output


def _in_eval(module: nn.Module) -> nn.Module:
    """Return a module with the same tensors and settings in eval mode; the module stays its own."""
    twin: nn.Module = object.__new__(type(module))
    children = {name: child and _in_eval(child) for name, child in module._modules.items()}
    twin.__dict__.update(vars(module), training=False, _modules=children)
    return twin
