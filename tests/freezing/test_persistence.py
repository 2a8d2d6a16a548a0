"""A hold survives what users do to models: copies, files, casts, compilers, exporters."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import stillnorm as sn
from stillnorm.norms import find_norms, hold_of
from support import layers
from support.fingerprint import Fingerprint, bits
from support.zoo import timm, torchvision


def statistics(net: nn.Module) -> list[object]:
    """The bits of everything that is frozen."""
    return [bits(t) for norm in find_norms(net) for t in norm.tensors().values()]


def frozen_net(affine: str = "frozen") -> tuple[nn.Module, Tensor, Tensor]:
    """A held network in train mode, with an own forward in it; an input; the eval output."""
    net = nn.Sequential(layers.conv_net(), nn.Unflatten(1, (5, 1, 1)), nn.Conv2d(5, 4, 1))
    net.append(layers.make("own F.batch_norm")).append(layers.make("timm BatchNormAct2d"))
    x = layers.conv_input()
    expected = net.eval()(x)
    sn.freeze(net, affine=affine)  # type: ignore[arg-type]
    return net.train(), x, expected


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------------------- modes


WAKE: dict[str, Callable[[nn.Module], object]] = {
    "model.train()": lambda net: net.train(),
    "child.train()": lambda net: [m.train() for m in net.modules()],
    "apply": lambda net: net.apply(lambda m: m.train()),
    "training = True": lambda net: [setattr(m, "training", True) for m in net.modules()],
    "requires_grad_": lambda net: net.requires_grad_(True),
    "eval and train": lambda net: net.eval().train(),
    "momentum": lambda net: [setattr(m, "momentum", 1.0) for m in net.modules()],
    "track": lambda net: [setattr(m, "track_running_stats", True) for m in net.modules()],
}


@pytest.mark.parametrize("affine", ["frozen", "trains"])
@pytest.mark.parametrize("how", WAKE)
def test_modes(how: str, affine: str) -> None:
    net, x, expected = frozen_net(affine)
    before = statistics(net)
    for _ in range(2):
        WAKE[how](net)
        y = net(x)
        assert torch.equal(y, expected)
        y.sum().backward()
    assert statistics(net) == before
    assert sn.is_frozen(net)


# ------------------------------------------------------------------------------- copies and files


def _saved(net: nn.Module) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(net, Path(folder) / "net.pt")
        loaded: nn.Module = torch.load(Path(folder) / "net.pt", weights_only=False)
        return loaded


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "pickle 2": lambda net: pickle.loads(pickle.dumps(net, protocol=2)),
    "torch.save": _saved,
    "AveragedModel": lambda net: torch.optim.swa_utils.AveragedModel(net),
    "clone of parts": lambda net: nn.Sequential(*(copy.deepcopy(m) for m in net)),
}


@pytest.mark.parametrize("affine", ["frozen", "trains"])
@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str, affine: str) -> None:
    net, x, expected = frozen_net(affine)
    twin = COPIES[how](net).train()
    assert sn.is_frozen(twin)
    assert torch.equal(twin(x), expected)
    twin(10 * x).sum().backward()
    assert torch.equal(twin(x), expected)
    assert [n.hold.affine for n in find_norms(twin) if n.hold] == [affine] * 5
    sn.unfreeze(twin)
    assert not sn.is_frozen(twin)
    assert sn.is_frozen(net)


def test_state_dict_both_ways_strict() -> None:
    """Keys, order, metadata: a held and a plain network read each other's files."""
    plain = layers.conv_net(seed=1)
    held = layers.conv_net(seed=2)
    keys = list(held.state_dict())
    metadata = held.state_dict()._metadata
    sn.freeze(held)
    assert list(held.state_dict()) == keys
    assert held.state_dict()._metadata == metadata
    assert [k for k, _ in held.named_parameters()] == [k for k, _ in plain.named_parameters()]
    held.load_state_dict(plain.state_dict(), strict=True)
    assert statistics(held) == statistics(plain)
    assert sn.is_frozen(held)
    back = layers.conv_net(seed=3)
    back.load_state_dict(held.state_dict(), strict=True)
    assert statistics(back) == statistics(plain)
    buffer = io.BytesIO()
    torch.save(held.state_dict(), buffer)
    buffer.seek(0)
    assert list(torch.load(buffer, weights_only=True)) == keys


def test_state_dict_assign_keeps_the_hold() -> None:
    held = layers.conv_net(seed=2)
    sn.freeze(held)
    held.load_state_dict(layers.conv_net(seed=1).state_dict(), strict=True, assign=True)
    assert sn.is_frozen(held)
    before = statistics(held)
    held.train()(layers.conv_input()).sum().backward()
    assert statistics(held) == before
    assert held[1].weight.grad is None


def test_checkpoints_from_before_torch_0_4_1() -> None:
    """No num_batches_tracked in the file: torch's own rule for it still holds."""
    held = layers.conv_net()
    sn.freeze(held)
    state = {k: v for k, v in layers.conv_net(seed=2).state_dict().items() if "num_" not in k}
    assert held.load_state_dict(state, strict=True).missing_keys == []


def test_explicit_writes_are_obeyed() -> None:
    """A hold protects from accidents, not from the user."""
    net, x, expected = frozen_net()
    layer = net[0][1]
    layer.running_mean.copy_(torch.ones(4))
    assert not torch.equal(net(x), expected)
    layer.reset_parameters()
    assert float(layer.running_var.sum()) == 4.0
    assert sn.is_frozen(net)


# ------------------------------------------------------------------------------- casts


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("first", ["freeze", "cast"])
def test_casts_before_and_after(first: str, dtype: torch.dtype) -> None:
    """The cast of the original, whichever came first; the output is that of the cast network."""
    net, plain = layers.conv_net(), layers.conv_net()
    if first == "freeze":
        sn.freeze(net)
        net.to(dtype)
    else:
        net.to(dtype)
        sn.freeze(net)
    plain.to(dtype).eval()
    assert statistics(net) == statistics(plain)
    x = layers.conv_input().to(dtype)
    net.train()
    assert bits(net(x)) == bits(plain(x))
    net(x.requires_grad_()).sum().backward()
    assert statistics(net) == statistics(plain)


def test_half_network_with_norms_in_float32() -> None:
    """Thread 001, section 5: float32 norms between half convolutions."""
    net, plain = layers.conv_net(), layers.conv_net()
    sn.freeze(net)
    for model in (net, plain):
        model.half()
        for layer in (model[1], model[3][1], model[6]):
            layer.float()
    x = layers.conv_input().half()
    expected = plain.eval()(x)
    assert expected.dtype == torch.float16
    assert bits(net.train()(x)) == bits(expected)


def test_moves() -> None:
    """.to(device), to_empty, share_memory, channels_last: the hold and the identity stay."""
    net, x, expected = frozen_net()
    held = [norm.module for norm in find_norms(net)]
    net.to("cpu").share_memory()
    net.to(memory_format=torch.channels_last)
    torch.testing.assert_close(net(x.contiguous(memory_format=torch.channels_last)), expected)
    net.to("meta")
    assert [norm.module for norm in find_norms(net)] == held
    assert sn.is_frozen(net)
    net.to_empty(device="cpu")
    assert sn.is_frozen(net)


# ------------------------------------------------------------------------------- compilers


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("order", ["freeze first", "compile first"])
def test_compiled_whole(order: str, backend: str) -> None:
    """fullgraph: no graph break in a held layer; compiled before or after."""
    plain, x, expected = frozen_net()
    sn.unfreeze(plain)
    net: nn.Module = plain.train()
    if order == "compile first":
        net = torch.compile(plain, fullgraph=True, backend=backend)
        before = statistics(plain)
        net(x)  # compiled with live layers, once
        assert statistics(plain) != before
        plain.load_state_dict(frozen_net()[0].state_dict())
        sn.freeze(net)
    else:
        sn.freeze(plain)
        net = torch.compile(plain, fullgraph=True, backend=backend)
    before = statistics(plain)
    net.train()
    torch.testing.assert_close(net(x), expected)
    net(x.clone().requires_grad_()).sum().backward()
    assert statistics(plain) == before
    assert all(p.grad is None for norm in find_norms(plain) for p in norm.module.parameters())
    assert sn.is_frozen(net)
    assert [norm.path for norm in find_norms(net)] == [norm.path for norm in find_norms(plain)]
    sn.unfreeze(net)
    net.train()
    net(x)  # and back: it learns again
    assert statistics(plain) != before


def test_compiled_with_requires_grad_switched_on_again() -> None:
    net, x, _ = frozen_net()
    net.requires_grad_(True)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compiled(x.requires_grad_()).sum().backward()
    assert all(p.grad is None for norm in find_norms(net) for p in norm.module.parameters())


@pytest.mark.parametrize("name", ["2d", "own F.batch_norm", "instance2d"])
def test_compiled_with_training_written_directly(name: str) -> None:
    """Before the first call and after it: compiled code takes the flag back too."""
    net = nn.Sequential(layers.make(name))
    x = layers.example(name)
    expected = net.eval()(x)
    sn.freeze(net)
    before = statistics(net)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    for _ in range(2):
        net[0].training = True
        assert torch.equal(compiled(x), expected)
        assert not net[0].training
    assert statistics(net) == before


@pytest.mark.parametrize("name", ["2d", "own F.batch_norm"])
def test_what_is_held_changes_after_compiling(name: str) -> None:
    """frozen to trains and back: the compiled code is not that of before."""
    net = nn.Sequential(layers.make(name))
    sn.freeze(net)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x = layers.example(name).requires_grad_()
    for affine, learns in (("frozen", False), ("trains", True), ("frozen", False)):
        sn.freeze(net, affine=affine)  # type: ignore[arg-type]
        compiled(x).sum().backward()
        assert (net[0].weight.grad is not None) is learns


def test_compiled_learning_affine() -> None:
    net, x, _ = frozen_net("trains")
    eager = copy.deepcopy(net)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for model in (compiled, eager):
        model(x).square().sum().backward()
    for a, b in zip(net.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------------------------- exporters


@pytest.mark.parametrize("strict", [True, False])
def test_torch_export(strict: bool) -> None:
    net, x, expected = frozen_net()
    norms = [norm.module for norm in find_norms(net)]
    before = [Fingerprint(layer) for layer in norms]
    program = torch.export.export(net, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), expected)
    for layer, seen in zip(norms, before, strict=True):
        assert Fingerprint(layer).differences(seen) == []


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_exporters(dynamo: bool, tmp_path: Path) -> None:
    """The file computes the eval output; afterwards every held layer is as it was (thread 004)."""
    net, x, expected = frozen_net()
    norms = [norm.module for norm in find_norms(net)]
    before = statistics(net)
    file = tmp_path / "net.onnx"
    torch.onnx.export(net, (x,), file, dynamo=dynamo, verbose=False)
    onnx.checker.check_model(onnx.load(file))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-3, atol=1e-4)
    assert statistics(net) == before
    assert [layer.training for layer in norms] == [False] * len(norms)
    assert [hold_of(layer) is not None for layer in norms] == [True] * len(norms)
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("mode", ["EVAL", "TRAINING", "PRESERVE"])
def test_the_old_onnx_exporter_in_every_mode(mode: str, tmp_path: Path) -> None:
    """With dynamo=False it calls train() on the whole model and does not give modes back."""
    net, x, expected = frozen_net()
    before = statistics(net)
    file = tmp_path / "net.onnx"
    training = getattr(torch.onnx.TrainingMode, mode)
    torch.onnx.export(net, (x,), file, dynamo=False, training=training, verbose=False)
    assert statistics(net) == before
    assert torch.equal(net.train()(x), expected)
    for node in onnx.load(file).graph.node:
        if node.op_type == "BatchNormalization":
            assert all(a.i == 0 for a in node.attribute if a.name == "training_mode")


def test_jit_trace() -> None:
    net, x, expected = frozen_net()
    traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(x), expected)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), expected)
    assert torch.equal(net(x), expected)


def test_fx_and_feature_extraction() -> None:
    """The extractor's copy is held too (timm's own freezing is lost here: timm#1910)."""
    net = torchvision.models.resnet18(num_classes=4)
    layers.settle(net)
    x = torch.randn(2, 3, 32, 32)
    expected = net.eval().layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
    sn.freeze(net)
    extractor = torchvision.models.feature_extraction.create_feature_extractor(net, ["layer1"])
    extractor.train()
    assert torch.equal(extractor(x)["layer1"], expected)
    assert sn.is_frozen(extractor)
    traced = torch.fx.symbolic_trace(net).train()
    before = statistics(traced)
    traced(x)
    assert statistics(traced) == before


def test_timm_feature_extraction() -> None:
    net = layers.settle(timm.create_model("resnet10t", features_only=True))
    x = torch.randn(2, 3, 32, 32)
    expected = net.eval()(x)
    sn.freeze(net)
    before = statistics(net)
    for a, b in zip(net.train()(x), expected, strict=True):
        assert torch.equal(a, b)
    assert statistics(net) == before


# ------------------------------------------------------------------------------- autograd tools


@pytest.mark.parametrize("affine", ["frozen", "trains"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, affine: str) -> None:
    """Both kinds: output and gradients of the network without checkpoints."""
    net, x, expected = frozen_net(affine)
    plain = copy.deepcopy(net)
    before = statistics(net)
    y = checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    gradient, x.grad = x.grad, None
    plain(x).square().sum().backward()
    assert torch.equal(gradient, x.grad)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    assert statistics(net) == before


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_in_segments(reentrant: bool) -> None:
    """A cut right before and right after a held layer."""
    net, x, expected = frozen_net()
    before = statistics(net)
    y = checkpoint_sequential(net[0], 7, x.requires_grad_(), use_reentrant=reentrant)
    y.sum().backward()
    assert statistics(net) == before
    assert torch.equal(net[1:](y), expected)


def test_checkpoint_wrapper_leaves_paths_alone() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net = layers.conv_net()
    paths = [norm.path for norm in find_norms(net)]
    net[3] = checkpoint_wrapper(net[3])
    net[1] = checkpoint_wrapper(net[1])
    assert [norm.path for norm in find_norms(net)] == paths
    assert sn.freeze(net, "3").frozen == ("3.1",)
    before = statistics(net[3])
    net.train()(layers.conv_input().requires_grad_()).sum().backward()
    assert statistics(net[3]) == before


def test_functional_call_and_torch_func() -> None:
    """Buffers passed from outside are normalised by; nothing is written; vmap, grad, jvp work."""
    net, x, expected = frozen_net()
    values = {k: v.detach() for k, v in net.state_dict().items()}
    before = statistics(net)
    assert torch.equal(torch.func.functional_call(net, values, (x,)), expected)

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (sample[None],)).square().sum()

    parameters = {k: v.detach() for k, v in net.named_parameters()}
    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index in range(len(x)):
        one = torch.func.grad(loss)(parameters, x[index])
        for key, gradient in one.items():
            torch.testing.assert_close(per_sample[key][index], gradient, rtol=1e-3, atol=1e-2)
    for norm in find_norms(net):
        assert float(per_sample[f"{norm.path}.weight"].abs().sum()) == 0.0
    tangents = (torch.ones_like(x),)
    y, _ = torch.func.jvp(net, (x,), tangents)
    torch.testing.assert_close(y, expected)
    shifted = values | {"0.1.running_mean": values["0.1.running_mean"] + 1}
    assert not torch.equal(torch.func.functional_call(net, shifted, (x,)), expected)
    assert statistics(net) == before


def test_ensembles_by_vmap() -> None:
    """stack_module_state: running statistics with a batch dimension of their own."""
    nets = [nn.Sequential(layers.make("2d", seed)) for seed in (1, 2)]
    x = layers.example("2d")
    expected = [net.eval()(x) for net in nets]
    for net in nets:
        sn.freeze(net)
    parameters, buffers = torch.func.stack_module_state(nets)
    base = copy.deepcopy(nets[0]).to("meta")

    def one(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(base, (p, b), (x,))

    torch.testing.assert_close(torch.vmap(one)(parameters, buffers), torch.stack(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batched_gradients(dtype: torch.dtype) -> None:
    """is_grads_batched and a vectorised Jacobian, through the custom backward."""
    layer = layers.make("2d").to(dtype)
    sn.freeze(layer)
    x = layers.example("2d", dtype=dtype).requires_grad_()
    y = layer(x)
    dys = torch.randn(3, *y.shape).to(dtype)
    (batched,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
    for dy, gradient in zip(dys, batched, strict=True):
        (one,) = torch.autograd.grad(y, x, dy, retain_graph=True)
        assert torch.equal(gradient, one)


def test_forward_ad() -> None:
    net, x, _ = frozen_net()
    plain = copy.deepcopy(net)
    sn.unfreeze(plain)
    plain.eval()
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        ours = torch.autograd.forward_ad.unpack_dual(net(dual)).tangent
        torchs = torch.autograd.forward_ad.unpack_dual(plain(dual)).tangent
    torch.testing.assert_close(ours, torchs)


def test_double_backward_through_a_network() -> None:
    """A gradient penalty: equal to that of the network in eval mode."""
    net, x, _ = frozen_net()
    plain = copy.deepcopy(net)
    sn.unfreeze(plain)
    plain.eval()
    results = []
    for model in (net, plain):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), leaf)
        results.append(second)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-2)


def test_inference_mode_and_offloading() -> None:
    net, x, expected = frozen_net()
    with torch.inference_mode():
        assert torch.equal(net(x), expected)
    with torch.autograd.graph.save_on_cpu():
        net(x.requires_grad_()).sum().backward()
    assert x.grad is not None


def test_data_parallel_replicas() -> None:
    """What DataParallel makes of a module: a replica with the same class and record."""
    net, x, expected = frozen_net()
    replica = net[0][1]._replicate_for_data_parallel()
    assert hold_of(replica) is not None
    assert torch.equal(nn.DataParallel(net)(x), expected)


# ------------------------------------------------------------------------------- stillnorm's own


def test_context_managers_leave_holds_alone() -> None:
    net, x, expected = frozen_net()
    before = Fingerprint(net, versions=False)
    for manager in (sn.eval_mode, sn.no_updates, sn.preserved):
        with manager(net):
            net.train()
            assert torch.equal(net(x), expected)
            assert sn.is_frozen(net)
        assert sn.is_frozen(net)
        net.train()
        assert torch.equal(net(x), expected)
    assert Fingerprint(net, versions=False).differences(before) == []
