"""Real architectures that nobody here wrote: promises 1 to 4 on each of them."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import stillnorm as sn
from stillnorm.norms import NormLayer, find_norms
from support import zoo
from support.fingerprint import Fingerprint
from support.oracles import saved_bytes

HALF = ("torchvision/resnet18", "timm/efficientnet_lite0", "transformers/resnet")


@cache
def _built(name: str) -> nn.Module:
    return zoo.make(name)


def build(name: str) -> nn.Module:
    """A fresh copy of an architecture with its statistics estimated, in eval mode."""
    return copy.deepcopy(_built(name))


def quiet(net: nn.Module) -> nn.Module:
    """Train mode everywhere but in what draws random numbers: dropout, stochastic depth."""
    net.train()
    for module in net.modules():
        named_so = any(word in type(module).__name__ for word in ("Drop", "StochasticDepth"))
        if named_so or getattr(module, "drop_rate", 0):
            module.training = False
    return net


@pytest.mark.parametrize("name", zoo.CLASSIFIERS)
def test_held_network(name: str) -> None:
    """One pass through everything: output, gradient, training step, memory, and back."""
    net, plain = build(name), build(name)
    net.train()
    modes = {path: m.training for path, m in net.named_modules()}
    pristine = Fingerprint(net)
    x = zoo.images(2)
    expected = plain(x)

    report = sn.freeze(net)
    assert report.refused == ()
    assert len(report.frozen) == len(find_norms(net))
    assert list(net.state_dict()) == list(plain.state_dict())
    assert torch.equal(net.eval()(x), expected)  # bit for bit
    assert torch.equal(quiet(net)(x), expected)  # and the same function in train mode
    assert sn.is_frozen(net)

    gradients = []
    for model in (net, plain):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    scale = float(gradients[1].abs().max())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5 * scale)

    frozen = {k: t.clone() for n in find_norms(net) for k, t in _named(n).items()}
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    optimizer.step()
    for norm in find_norms(net):
        for key, tensor in _named(norm).items():
            assert torch.equal(tensor, frozen[key]), key

    sn.unfreeze(net)
    net.load_state_dict(plain.state_dict())
    net.zero_grad()
    for path, mode in modes.items():  # quiet() was ours
        net.get_submodule(path).training = mode
    different = Fingerprint(net).differences(pristine)
    assert [w for w in different if "version" not in w and "random" not in w] == []


def _named(norm: NormLayer) -> dict[str, Tensor]:
    return {f"{norm.path}.{key}": tensor for key, tensor in norm.tensors().items()}


@pytest.mark.parametrize("name", zoo.CLASSIFIERS)
def test_saves_less_than_eval_mode_and_no_more_than_no_norm_at_all(name: str) -> None:
    """A held network keeps what the same network without norms keeps, plus C-sized vectors.

    The twin without norms multiplies by a constant that autograd keeps: no activation.
    """
    net, plain, without = build(name), build(name), build(name)
    sn.freeze(net)
    channels = sum(norm.num_features for norm in find_norms(net))
    for norm in find_norms(without):
        _without_norm(norm.module)
    x = zoo.images(2).requires_grad_()
    held = saved_bytes(net, x)
    assert held < saved_bytes(plain, x)
    assert held <= saved_bytes(without, x) + 2 * 4 * channels


def _without_norm(layer: nn.Module) -> None:
    """Replace the norm of the layer by a product with 1, and keep what else its class does."""
    ones = torch.ones(())

    class Nothing(type(layer)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            y = x * ones
            return self.act(self.drop(y)) if hasattr(self, "drop") else y

    layer.__class__ = Nothing


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["freeze first", "cast first"])
@pytest.mark.parametrize("name", HALF)
def test_half_precision(name: str, order: str, dtype: torch.dtype) -> None:
    net, plain = build(name), build(name).to(dtype)
    x = zoo.images(1, size=32).to(dtype)
    expected = plain(x)
    if order == "freeze first":
        sn.freeze(net)
        net.to(dtype)
    else:
        net.to(dtype)
        sn.freeze(net)
    y = quiet(net)(x)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize("name", HALF)
def test_autocast(name: str) -> None:
    net, plain = build(name), build(name)
    x = zoo.images(1, size=32)
    sn.freeze(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, y = plain(x), quiet(net)(x)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize("name", HALF)
def test_learning_affine(name: str) -> None:
    """Gradients of weight and bias are those of eval mode, bit for bit; statistics stand still."""
    net, plain = build(name), build(name)
    sn.freeze(net, affine="trains")
    quiet(net)
    x = zoo.images(2, size=32)
    for model in (net, plain):
        model(x).square().sum().backward()
    for (key, a), b in zip(net.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), key
    for (key, a), b in zip(net.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), key


def test_part_of_a_network() -> None:
    """A backbone of a detector-like network is frozen; the head goes on learning."""
    net = build("torchvision/resnet18")
    report = sn.freeze(net, ["bn1", "layer[12]"])
    assert report.frozen[0] == "bn1"
    assert all(path.split(".")[0] in ("bn1", "layer1", "layer2") for path in report.frozen)
    before = {k: t.clone() for k, t in net.state_dict().items() if "running_mean" in k}
    net.train()(zoo.images(2, size=32))
    for key, tensor in before.items():
        path = key.removesuffix(".running_mean")
        assert torch.equal(net.state_dict()[key], tensor) is (path in report.frozen), key
