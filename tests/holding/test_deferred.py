"""What waits for its norm: any path that a program takes gives what it always gave.

The reference is the same network in eval mode, run by plain torch.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import stillnorm as sn
from stillnorm.errors import StateError
from stillnorm.holding.deferred import Deferred
from support import layers
from support.folding import AFFINE, DTYPE, Variant, agree, folded, gradients, net, skipped, x

# ------------------------------------------------------------------------ other paths than the norm


def _second_consumer(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return m.norm(z) + z.mean()


def _first_consumer(m: Any, z: Tensor, x: Tensor) -> Tensor:
    s = z.std()
    return m.norm(z) * s


def _in_place(m: Any, z: Tensor, x: Tensor) -> Tensor:
    z.relu_()
    return m.norm(z)


def _slice_assignment(m: Any, z: Tensor, x: Tensor) -> Tensor:
    z[:, 1] = 0.5
    return m.norm(z)


def _view(m: Any, z: Tensor, x: Tensor) -> Tensor:
    v = z.view(-1)
    v.mul_(3)
    return m.norm(z)


def _numpy(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return m.norm(z) * float(z.detach().numpy().sum())


def _data(m: Any, z: Tensor, x: Tensor) -> Tensor:
    z.data.add_(1)
    return m.norm(z)


def _twice(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return m.norm(z) + m.norm(z)


def _cat(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return m.norm(torch.cat([z, z + 1])[: len(z)])


def _no_grad_convolution(m: Any, z: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = m.conv(x)
    return m.norm(z) + x.mean()


def _no_grad_norm(m: Any, z: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.norm(z)
    return y + z


def _looked_at_without_gradients(m: Any, z: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        z.mean()
    return m.norm(z)


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        return 2 * z

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


def _custom_function(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return m.norm(_Double.apply(z))


def _reentrant_between(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return checkpoint(m.norm, z, use_reentrant=True)  # type: ignore[no-any-return]


def _checkpoint_between(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return checkpoint(m.norm, z, use_reentrant=False)  # type: ignore[no-any-return]


def _checkpoint_before(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return m.norm(checkpoint(m.conv, x, use_reentrant=False))


def _reentrant_before(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return m.norm(checkpoint(m.conv, x, use_reentrant=True))


def _checkpoint_around(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return checkpoint(lambda x: m.norm(m.conv(x)), x, use_reentrant=False)  # type: ignore[no-any-return]


def _reentrant_both(m: Any, z: Tensor, x: Tensor) -> Tensor:
    z = checkpoint(m.conv, x, use_reentrant=True)
    with torch.no_grad():
        z.mean()
    return checkpoint(m.norm, z, use_reentrant=True)  # type: ignore[no-any-return]


def _checkpoint_of_another_use(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return m.norm(z) + checkpoint(torch.tanh, z, use_reentrant=False)  # type: ignore[no-any-return]


def _checkpoint_then_looked_at(m: Any, z: Tensor, x: Tensor) -> Tensor:
    y = checkpoint(m.norm, z, use_reentrant=False)
    z.sum().item()
    return y  # type: ignore[no-any-return]


class _DoubleInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.mark_dirty(z)
        return z.mul_(2)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * dy


def _custom_function_in_place(m: Any, z: Tensor, x: Tensor) -> Tensor:
    _DoubleInPlace.apply(z)
    return m.norm(z)  # type: ignore[no-any-return]


def _reentrant_around(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return checkpoint(lambda x: m.norm(m.conv(x)), x, use_reentrant=True)  # type: ignore[no-any-return]


def _tensor_hook(m: Any, z: Tensor, x: Tensor) -> Tensor:
    z.register_hook(lambda grad: 3 * grad)
    return m.norm(z)


def _other_norm(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return nn.functional.batch_norm(z, m.norm.running_mean + 1, m.norm.running_var)


def _by_batch(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return nn.functional.batch_norm(z, None, None, training=True)


def _deepcopied(m: Any, z: Tensor, x: Tensor) -> Tensor:
    return m.norm(copy.deepcopy(z.detach()) + z)


PATHS = [
    skipped,
    *(
        value
        for name, value in list(globals().items())
        if name.startswith("_")
        and getattr(value, "__annotations__", {}).keys() == {"m", "z", "x", "return"}
    ),
]


@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_what_takes_another_path_is_computed_as_it_always_was(path: Any, affine: Any) -> None:
    """The example folds; then the network goes another way."""
    model, plain = Variant(path), Variant(path).eval()
    folded(model, affine=affine)
    plain.norm.requires_grad_(affine == "trains")
    model.on = plain.on = True
    agree(gradients(model), gradients(plain), affine="both")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_without_gradients_too(path: Any) -> None:
    if path is _tensor_hook:
        return
    model, plain = Variant(path), Variant(path).eval()
    folded(model)
    model.on = plain.on = True
    with torch.no_grad():
        torch.testing.assert_close(model(x()), plain(x()), rtol=1e-9, atol=1e-11)
        with torch.inference_mode():
            torch.testing.assert_close(model(x()), plain(x()), rtol=1e-9, atol=1e-11)


def test_an_input_written_before_the_norm_raises_and_never_gives_a_wrong_value() -> None:
    def between(m: Any, z: Tensor, x: Tensor) -> Tensor:
        x.add_(1)
        return m.norm(z)

    model = Variant(between)
    folded(model)
    model.on = True
    with torch.no_grad(), pytest.raises(StateError, match="was changed"):
        model(x())


def test_a_program_that_writes_the_input_before_the_norm_is_refused() -> None:
    def between(m: Any, z: Tensor, x: Tensor) -> Tensor:
        x.add_(1)
        return m.norm(z)

    model = Variant(between)
    model.on = True
    report = sn.freeze(model, fold_on=x(), fold_when="always")
    assert "is written before the norm" in dict(report.not_folded)["norm"]


@pytest.mark.parametrize("ask", [Tensor.retain_grad, lambda z: z.register_hook(print)])
def test_who_asks_for_the_gradient_at_the_convolution_too_late_is_told(ask: Any) -> None:
    """Before the norm it is obeyed; after it no gradient passes there any more."""
    model = Variant(skipped)
    folded(model)
    z = model.conv(x())
    model.norm(z)
    with pytest.raises(StateError, match="asks for the gradient at the output"):
        ask(z)
    z = model.conv(x())
    z.retain_grad()
    model.norm(z).sum().backward()
    assert z.grad is not None


@pytest.mark.parametrize("affine", AFFINE)
def test_a_linear_layer_at_the_input(affine: Any) -> None:
    """Autograd saves no weight where the input needs no gradient."""
    model = layers.settle(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).to(DTYPE)
    plain = copy.deepcopy(model).eval()
    example = torch.randn(5, 3, dtype=DTYPE)
    folded(model, example, affine=affine)
    for one in (model, plain):
        one(example).square().sum().backward()
    torch.testing.assert_close(model[0].weight.grad, plain[0].weight.grad, rtol=1e-9, atol=1e-11)


def test_an_example_with_one_value_per_channel() -> None:
    """A batch of one is a reason to freeze."""
    model = layers.settle(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))).train()
    assert sn.freeze(model, fold_on=torch.randn(1, 3), fold_when="always").folded == ("1",)


def test_a_program_under_a_transform_is_left_alone() -> None:
    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def forward(self, x: Tensor) -> Tensor:
            return torch.func.vmap(lambda one: self.net(one.unsqueeze(0)))(x)  # type: ignore[no-any-return]

    model = Inside()
    expected = copy.deepcopy(model).eval()(x())
    report = sn.freeze(model, fold_on=x(), fold_when="always")
    assert report.folded == ()
    torch.testing.assert_close(model(x()), expected, rtol=1e-9, atol=1e-11)


def test_a_stand_in_that_leaves_the_model_is_a_tensor_like_any() -> None:
    model, plain = Variant(skipped), Variant(skipped).eval()
    folded(model)
    z, expected = model.conv(x()), plain.conv(x())
    assert isinstance(z, Deferred)
    assert (z.shape, z.dtype, z.requires_grad, z.dim()) == (expected.shape, DTYPE, True, 4)
    assert torch.equal(z, expected)
    assert repr(z) == repr(expected)
    assert torch.equal(torch.stack([z, z]), torch.stack([expected, expected]))
    assert torch.equal(pickle.loads(pickle.dumps(z.detach())), expected)
    assert z.stride() == expected.stride()


# ---------------------------------------------------------------------------------- hooks see truth


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("layer", ["conv", "norm"])
@pytest.mark.parametrize(
    "kind",
    [
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)
def test_hooks(kind: str, layer: str, when: str) -> None:
    """They see what they would have seen, stored beyond the step, too."""
    seen: dict[str, list[Any]] = {"model": [], "plain": []}
    model, plain = Variant(skipped), Variant(skipped).eval()

    def hook(name: str) -> None:
        one = model if name == "model" else plain
        getattr(getattr(one, layer), kind)(lambda module, *values: seen[name].append(values))

    if when == "before":
        hook("model")
    report = sn.freeze(model, fold_on=x(), fold_when="always")
    before_conv = layer == "conv" and kind == "register_forward_pre_hook"
    after_norm = layer == "norm" and kind == "register_full_backward_pre_hook"
    if when == "before" and not (before_conv or after_norm):
        assert "hook" in dict(report.not_folded)["norm"]
    if when == "after":
        hook("model")
    hook("plain")
    seen["model"].clear()
    results = gradients(model.train()), gradients(plain)
    agree(results[0], {k: results[1][k] for k in results[0]}, "both")
    with torch.no_grad():
        model.conv.weight.mul_(2)
    flat = [torch.utils._pytree.tree_leaves(values) for values in seen.values()]
    assert len(flat[0]) == len(flat[1])
    for a, b in zip(*flat, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-9, atol=1e-11)
