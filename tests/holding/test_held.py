"""A held layer: same output, same object, same keys; it saves nothing and cannot be thawed."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from stillnorm.holding import hold, release
from stillnorm.holding.held import held_class
from stillnorm.norms import hold_of
from stillnorm.norms.hold import HOLD
from support import layers, oracles
from support.fingerprint import bits
from support.layers import CASES, CHEAP
from support.tolerances import GRADIENT_ULP

# dtype of the layer, dtype of the input; half inputs with a float32 layer are thread 001's case.
PRECISIONS = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float32 layer, float16 input": (torch.float32, torch.float16),
    "float32 layer, bfloat16 input": (torch.float32, torch.bfloat16),
}


def twins(
    name: str, affine: str = "frozen", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, nn.Module]:
    """A plain layer in eval mode and a held copy that is asked to train."""
    plain = layers.make(name).to(dtype).eval()
    held = copy.deepcopy(plain).train()
    hold(held, affine)  # type: ignore[arg-type]
    return plain, held.train()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("affine", ["frozen", "trains"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_output_has_the_bits_of_eval_mode(
    name: str, precision: str, affine: str, grad: bool
) -> None:
    """Also without gradients, and with an input that needs none."""
    of_layer, of_input = PRECISIONS[precision]
    plain, held = twins(name, affine, of_layer)
    x = layers.example(name, dtype=of_input)
    try:
        expected = plain(x)
    except RuntimeError:  # torch's instance norm refuses mixed precision
        assert name.startswith("instance")
        return
    with torch.set_grad_enabled(grad):
        assert bits(held(x)) == bits(expected)
        assert bits(held(x.clone().requires_grad_())) == bits(expected)


@pytest.mark.parametrize("of_input", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_output_has_the_bits_of_eval_mode_under_autocast(
    name: str, to: torch.dtype, of_input: torch.dtype
) -> None:
    """The dtype too: torchvision's frozen layer turns bfloat16 into float32 here."""
    plain, held = twins(name)
    x = layers.example(name, dtype=of_input)
    with torch.autocast("cpu", dtype=to):
        try:
            expected = plain(x)
        except RuntimeError:
            assert name.startswith("instance")
            return
        assert bits(held(x)) == bits(expected)
        assert bits(held(x.clone().requires_grad_())) == bits(expected)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", CASES)
def test_input_gradient_is_that_of_eval_mode(name: str, precision: str) -> None:
    of_layer, of_input = PRECISIONS[precision]
    plain, held = twins(name, "frozen", of_layer)
    x = layers.example(name, dtype=of_input)
    try:
        expected = _gradient(plain, x)
    except RuntimeError:
        assert name.startswith("instance")
        return
    if name in ("own formula", "own gate"):  # their own operators, unchanged
        assert torch.equal(_gradient(held, x), expected)
    else:
        assert oracles.ulp_distance(_gradient(held, x), expected) <= GRADIENT_ULP[of_input]


def _gradient(layer: nn.Module, x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)
    (gradient,) = torch.autograd.grad(y, leaf, dy)
    return gradient


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("affine=False", "instance3d")])
def test_learning_affine_gets_the_gradient_of_eval_mode(name: str) -> None:
    """Bit for bit: with affine="trains" it is torch's own backward."""
    plain, held = twins(name, "trains")
    x = layers.example(name)
    plain(x).square().sum().backward()
    held(x).square().sum().backward()
    compared = 0
    for (key, a), b in zip(plain.named_parameters(), held.parameters(), strict=True):
        assert a.grad is not None, key
        if name.startswith("instance"):  # another kernel: instance norm repeats the affine
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(b.grad, a.grad), key
        compared += 1
    assert compared


@pytest.mark.parametrize("name", CHEAP)
def test_saves_no_activation(name: str) -> None:
    """Exactly var and weight: C elements each. What comes after the norm is the user's."""
    plain, held = twins(name)
    x = layers.example(name).requires_grad_()
    shapes = list(_saved(held, x))
    vectors = [s for s in shapes if s == (4,)]
    assert len(vectors) == (1 if held.weight is None else 2)
    rest = [s for s in shapes if s != (4,)]
    # ReLU, in ReluNorm and in timm's layer, saves its result, and the next layer needs that anyway.
    expected = 1 if name in ("own F.batch_norm", "timm BatchNormAct2d") else 0
    assert len(rest) == expected
    if name.startswith("instance"):
        return
    assert len([s for s in _saved(plain, x) if s == x.shape]) == expected + 1


def _saved(layer: nn.Module, x: Tensor) -> Iterator[tuple[int, ...]]:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return (tuple(tensor.shape) for tensor in saved)


@pytest.mark.parametrize("name", CASES)
def test_statistics_stand_still_and_batch_mates_do_not_matter(name: str) -> None:
    """Through train(), and through `training = True` written past it."""
    _, held = twins(name)
    before = {key: bits(t) for key, t in held.state_dict().items()}
    x = layers.example(name)
    alone = held.train()(x[:1])
    for wake in (lambda: held.train(), lambda: setattr(held, "training", True)):
        wake()
        y = held(10 * x)
        assert not held.training
        y.sum()
        wake()
        assert torch.equal(held(x)[:1], alone)
    assert {key: bits(t) for key, t in held.state_dict().items()} == before


@pytest.mark.parametrize("name", [n for n in CHEAP if n not in ("affine=False", "instance3d")])
def test_no_gradient_reaches_affine_switched_on_again_by_hand(name: str) -> None:
    """The held forward takes weight and bias as constants, whatever their flags say.

    Not where a forward computes with the weight itself: nothing stands between there.
    """
    _, held = twins(name)
    for parameter in held.parameters():
        parameter.requires_grad_(True)
    y = held(layers.example(name).requires_grad_())
    y.sum().backward()
    assert all(parameter.grad is None for parameter in held.parameters())


def test_a_gate_of_the_users_own_still_learns() -> None:
    """Only weight and bias are frozen: a parameter that scales them is not."""
    plain, held = twins("own gate")
    for parameter in (plain.weight, plain.bias):
        parameter.requires_grad_(False)
    x = layers.example("own gate")
    plain(x).square().sum().backward()
    held(x).square().sum().backward()
    assert held.weight.grad is None
    assert torch.equal(held.gate.grad, plain.gate.grad)


# ------------------------------------------------------------------------------- what it still is


@pytest.mark.parametrize("name", CASES)
def test_is_the_same_object_of_a_class_named_after_its_own(name: str) -> None:
    """isinstance, loops over class names, keys, parameters, buffers."""
    layer = layers.make(name)
    base = type(layer)
    tensors = {key: id(t) for key, t in layer.state_dict(keep_vars=True).items()}
    hold(layer, "frozen")
    assert isinstance(layer, base)
    assert type(layer).__name__ == f"Held{base.__name__}"
    assert base.__name__ in str(type(layer))
    assert {key: id(t) for key, t in layer.state_dict(keep_vars=True).items()} == tensors
    assert "held=(statistics, affine)" in repr(layer)
    release(layer)
    hold(layer, "trains")
    assert "held=(statistics)" in repr(layer)


@pytest.mark.parametrize("affine", ["frozen", "trains"])
@pytest.mark.parametrize("name", CASES)
def test_survives_copies(name: str, affine: str) -> None:
    """deepcopy, pickle and torch.save: held in the same way, and releasable."""
    _, held = twins(name, affine)
    x = layers.example(name)
    expected = held(x)
    buffer = io.BytesIO()
    torch.save(held, buffer)
    buffer.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(held),
        "deepcopy of a deepcopy": copy.deepcopy(copy.deepcopy(held)),
        "pickle": pickle.loads(pickle.dumps(held)),
        "torch.save": torch.load(buffer, weights_only=False),
    }
    for how, twin in copies.items():
        assert type(twin) is type(held), how
        assert hold_of(twin) is not hold_of(held), how
        assert hold_of(twin).affine == affine, how
        twin.train()
        assert not twin.training, how
        assert torch.equal(twin(x), expected), how
        release(twin)
        assert type(twin) is type(held).held_base, how
        assert HOLD not in vars(twin), how
        assert "__module__" not in vars(twin), how
        assert twin.training is (name != "own sticky train()"), how
    assert hold_of(held) is not None


def test_a_copy_by_the_class_is_a_new_layer() -> None:
    """type(layer)(...) makes a plain layer, as nobody has held it yet."""
    held = layers.make("2d")
    hold(held, "frozen")
    new = type(held)(4)
    assert type(new) is nn.BatchNorm2d
    assert new.training
    new(torch.randn(2, 4, 3, 3))
    assert int(new.num_batches_tracked) == 1


def test_one_class_per_class() -> None:
    assert held_class(nn.BatchNorm2d) is held_class(nn.BatchNorm2d)
    assert held_class(nn.BatchNorm2d) is not held_class(layers.SubclassNorm)


def test_local_classes_are_held_and_copied() -> None:
    """Pickle refuses a class from inside a function, before a hold as after."""

    class Local(nn.BatchNorm2d):
        pass

    layer = layers.settle(Local(3))
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(layer)
    hold(layer, "frozen")
    assert hold_of(copy.deepcopy(layer)) is not None
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(layer)


def test_unknown_names_are_attribute_errors() -> None:
    import stillnorm.holding.held as module

    for name in ("HeldNothing", "nothing", "Heldx@no/such/module"):
        with pytest.raises((AttributeError, ModuleNotFoundError)):
            getattr(module, name)


# ------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("name", CASES)
def test_train_returns_the_layer_and_stays_in_eval(name: str) -> None:
    _, held = twins(name)
    for mode in (True, False, True):
        assert held.train(mode) is held
        assert not held.training
    assert held.eval() is held


def test_a_train_of_the_users_own_is_still_called() -> None:
    layer = layers.make("own train()")
    layer.calls.clear()
    hold(layer, "frozen")
    nn.Sequential(layer).train().eval()
    assert layer.calls == [True, False]


def test_children_of_a_held_layer_follow_train() -> None:
    """timm's layer has a dropout and an activation below it, which are not held."""
    layer = layers.settle(layers.timm_norm_act(drop_layer=nn.Dropout))
    hold(layer, "frozen")
    layer.train()
    assert layer.drop.training
    assert not layer.training
    layer.eval()
    assert not layer.drop.training


# ------------------------------------------------------------------------------- own forwards


def test_arguments_reach_an_own_forward() -> None:
    plain, held = twins("own by keywords")
    x = layers.example("own by keywords").requires_grad_()
    assert torch.equal(held(x, scale=3.0), plain(x, scale=3.0))
    assert torch.equal(held(x=x), plain(x=x))


def test_other_norms_inside_an_own_forward_are_left_alone() -> None:
    """Only the layer's own call is computed by constants: a child norm learns and updates."""

    class Pair(nn.BatchNorm2d):
        def __init__(self) -> None:
            super().__init__(4)
            self.other = nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(super().forward(x))

    layer = layers.settle(Pair())
    hold(layer, "frozen")
    layer.train()
    before = layer.other.running_mean.clone()
    layer(torch.randn(3, 4, 5, 5)).square().sum().backward()
    assert layer.other.weight.grad is not None
    assert not torch.equal(layer.other.running_mean, before)
    assert layer.weight.grad is None


def test_input_checks_are_the_layers_own() -> None:
    """A wrong rank or a wrong number of channels raises what it raised before."""
    for name, wrong in (
        ("2d", (3, 4)),
        ("1d", (3, 4, 5, 6)),
        ("3d", (3, 4, 5, 6)),
        ("2d", (3, 5, 2, 2)),
    ):
        plain, held = twins(name)
        with pytest.raises((ValueError, RuntimeError)) as before:
            plain(torch.randn(wrong))
        with pytest.raises(type(before.value)) as after:
            held(torch.randn(wrong))
        assert str(after.value) == str(before.value)


def test_a_tensor_subclass_stays_one() -> None:
    class Image(torch.Tensor):
        pass

    for name in ("2d", "own F.batch_norm"):
        plain, held = twins(name)
        x = layers.example(name).as_subclass(Image)
        for leaf in (x, x.clone().requires_grad_()):
            assert type(held(leaf)) is type(plain(leaf)) is Image


def test_scripting_thaws_and_keeps_the_eval_output() -> None:
    """TorchScript has no subclass: train() after it is torch's own; eval is unchanged."""
    for momentum in (0.1, None):
        layer = layers.settle(nn.BatchNorm2d(4, momentum=momentum))
        hold(layer, "frozen")
        x = torch.randn(3, 4, 5, 5)
        scripted = torch.jit.script(layer)
        assert torch.equal(scripted(x), layer(x))
        scripted.eval()
        assert torch.equal(scripted(x), layer(x))


def test_torch_fx_takes_it_for_a_leaf() -> None:
    """fx asks for the module of the class: torch.nn's layers are leaves before and after."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layers.make("2d"))
    hold(net[1], "frozen")
    traced = torch.fx.symbolic_trace(net)
    assert traced.get_submodule("1") is net[1]
    traced.train()
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(traced(x), net(x))


@pytest.mark.parametrize("name", ["own F.batch_norm", "own by keywords", "timm BatchNormAct2d"])
def test_torch_fx_traces_through_an_own_forward_as_before(name: str) -> None:
    plain, held = twins(name)
    x = layers.example(name)
    expected = torch.fx.symbolic_trace(nn.Sequential(plain))(x)
    traced = torch.fx.symbolic_trace(nn.Sequential(held)).train()
    assert torch.equal(traced(x), expected)


def test_every_torch_norm_is_covered() -> None:
    """A new norm class in torch must be thought about: held_class knows these forwards."""
    from stillnorm.holding.held import _TORCH_FORWARDS

    known = set(_TORCH_FORWARDS)
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert kind.forward in known
        assert issubclass(kind, _BatchNorm)
    for kind in (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d):
        assert kind.forward in known
