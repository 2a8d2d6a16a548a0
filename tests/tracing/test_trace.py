"""A trace says what each norm really did, on whose line, and leaves no trace itself."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import stillnorm as sn
from stillnorm.errors import BatchError, StateError
from stillnorm.tracing import Trace, trace
from support.fingerprint import Fingerprint
from support.layers import CASES, conv_input, conv_net, example, make, settle
from support.zoo import timm, torchvision

FrozenBatchNorm2d = torchvision.ops.FrozenBatchNorm2d


def used(traced: Trace) -> list[str]:
    return [call.used for call in traced.calls]


def line_of(function: Callable[..., Any], text: str) -> int:
    """Return the number of the line of a function that contains a text."""
    lines, first = inspect.getsourcelines(function)
    return first + next(i for i, line in enumerate(lines) if text in line)


# ------------------------------------------------------------------ what was used


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_shows_what_it_uses(name: str) -> None:
    layer = make(name)
    alone = "sample" if name.startswith("instance") else "batch"
    if not layer.train().training:
        alone = "running"  # its own train() holds it
    assert used(trace(layer, example(name))) == ["running"]
    assert used(trace(layer, example(name), flow="batch")) == [alone]
    assert used(trace(layer.train(), example(name), flow="as_is")) == [alone]
    assert used(trace(layer.eval(), example(name), flow="as_is")) == ["running"]


@pytest.mark.parametrize("name", CASES)
def test_held_layers_use_their_running_statistics_in_every_flow(name: str) -> None:
    layer = make(name)
    net = nn.Sequential(layer)
    if sn.freeze(net).refused:
        pytest.fail(f"{name} cannot be held")
    for flow in ("eval", "batch", "as_is"):
        assert used(trace(net.train(), example(name), flow=flow)) == ["running"]


def test_foreign_frozen_layers_use_their_running_statistics() -> None:
    for layer in (FrozenBatchNorm2d(3), timm.layers.FrozenBatchNormAct2d(3)):
        x = torch.randn(2, 3, 4, 4)
        (call,) = trace(layer.train(), x, flow="batch").calls
        assert call.used == "running"
        torch.testing.assert_close(call.sample_mean, x.double().mean((2, 3)))


def test_layers_called_by_keyword_are_seen() -> None:
    class ByKeyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.norm = FrozenBatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=self.frozen(x=x))

    assert used(trace(ByKeyword(), torch.randn(2, 3, 4, 4))) == ["running", "running"]


def test_a_layer_held_by_the_models_own_train_stays_by_running() -> None:
    class NormEval(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kept, self.free = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def train(self, mode: bool = True) -> NormEval:
            super().train(mode)
            self.kept.eval()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.free(self.kept(x))

    assert used(trace(NormEval(), torch.randn(2, 3, 4, 4), flow="batch")) == ["running", "batch"]


def test_flags_are_not_believed() -> None:
    class Stubborn(nn.BatchNorm2d):
        """Normalises by the batch whatever its flags say."""

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, training=True)

    layer, x = Stubborn(3), torch.randn(2, 3, 4, 4)
    before = Fingerprint(layer)
    assert used(trace(layer, x)) == ["batch"]
    assert not Fingerprint(layer).differences(before), "not even this one updates its statistics"


def test_layers_without_statistics_use_the_batch_in_eval() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert used(trace(nn.BatchNorm2d(3, track_running_stats=False), x)) == ["batch"]
    assert used(trace(nn.InstanceNorm2d(3), x)) == ["sample"]


def test_toggled_tracking_shows_both_faces() -> None:
    layer = nn.BatchNorm2d(3)
    layer.track_running_stats = False
    x = torch.randn(2, 3, 4, 4)
    assert used(trace(layer, x)) == ["running"]
    assert used(trace(layer, x, flow="batch")) == ["batch"]


def test_batch_flow_keeps_dropout_off_and_computes_what_training_does() -> None:
    net = nn.Sequential(conv_net(), nn.Dropout(0.9)).train()
    x, outputs = conv_input(), []
    trace(net, x, flow="batch", on_output=lambda output, batch: outputs.append(output))
    net[1].eval()
    assert torch.equal(outputs[0], net(x))


def test_one_value_per_channel_passes_by_the_running_statistics() -> None:
    layer = make("1d-flat")
    row, outputs = torch.randn(1, 4), []
    traced = trace(layer, row, flow="batch", on_output=lambda y, _: outputs.append(y))
    assert used(traced) == ["running"]
    assert traced.calls[0].values == 1
    assert torch.equal(outputs[0], layer.eval()(row))


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("instance")])
def test_one_value_passes_by_the_statistics_of_before_whatever_came_first(name: str) -> None:
    # A forward of its own may hand its buffers over to be updated; they are not, even meanwhile.
    x = example(name)
    one = x[:1].flatten(2)[..., :1] if x.dim() > 2 else x[:1]
    one = one.reshape(1, 4, *[1] * (x.dim() - 2))
    layer, outputs = make(name), []
    trace(layer, iter([x, one]), flow="batch", on_output=lambda y, _: outputs.append(y))
    torch.testing.assert_close(outputs[1], make(name).eval()(one))


def test_broken_statistics_do_not_spread_from_a_batch_of_one() -> None:
    layer = make("1d-flat")
    with torch.no_grad():
        layer.running_var[:3] = torch.tensor([float("nan"), 0.0, -1.0])
    outputs: list[Tensor] = []
    trace(layer, torch.randn(1, 4), flow="batch", on_output=lambda y, _: outputs.append(y))
    assert outputs[0].isfinite().all()
    assert outputs[0].abs().max() < 100


# ------------------------------------------------------------------ the numbers of a call


def test_a_call_has_the_moments_of_each_sample() -> None:
    x = torch.randn(5, 3, 4, 6)
    (call,) = trace(nn.BatchNorm2d(3), x).calls
    flat = x.double().flatten(2)
    torch.testing.assert_close(call.sample_mean, flat.mean(2))
    torch.testing.assert_close(call.sample_var, flat.var(2, correction=0), rtol=1e-6, atol=0)
    assert (call.shape, call.samples, call.positions, call.values) == ((5, 3, 4, 6), 5, 24, 120)
    assert call.dtype == torch.float32


def test_an_unbatched_instance_norm_is_one_sample() -> None:
    (call,) = trace(nn.InstanceNorm2d(3, track_running_stats=True), torch.randn(3, 4, 4)).calls
    assert call.shape == (1, 3, 4, 4)


def test_half_and_autocast_show_the_dtype_that_arrived() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.autocast("cpu", torch.bfloat16):
        assert trace(net, torch.randn(2, 3, 4, 4)).calls[0].dtype == torch.bfloat16


# ------------------------------------------------------------------ where and how often


class Shared(nn.Module):
    """Thread 003 in small: one norm at two places, one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.alias = self.norm
        self.never = nn.BatchNorm2d(3)
        self.last = nn.Sequential(nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        x = self.alias(self.conv(x) + 5)
        return self.last(x)


def test_calls_are_numbered_in_the_order_of_the_forward() -> None:
    traced = trace(Shared(), [torch.randn(2, 3, 4, 4), torch.randn(3, 3, 4, 4)])
    assert [(c.path, c.occurrence, c.order, c.batch) for c in traced.calls] == [
        ("norm", 0, 0, 0),
        ("norm", 1, 1, 0),
        ("last.0", 0, 2, 0),
        ("norm", 0, 0, 1),
        ("norm", 1, 1, 1),
        ("last.0", 0, 2, 1),
    ]
    assert traced.batches == 2
    assert traced.reached == {"norm", "last.0"}
    assert traced.unreached == ("never",)
    assert [[c.samples for c in site] for site in traced.sites("norm")] == [[2, 3], [2, 3]]
    assert [c.order for c in traced.by_layer("last.0")] == [2, 2]
    assert traced.sites("never") == ()


def test_sites_are_lines_of_the_users_code() -> None:
    traced = trace(Shared(), torch.randn(2, 3, 4, 4))
    lines = [line_of(Shared.forward, text) for text in ("self.norm(", "self.alias(", "self.last(")]
    assert [c.site.line for c in traced.calls if c.site] == lines
    site = traced.calls[0].site
    assert site is not None
    assert str(site) == f"test_trace.py:{lines[0]}"
    assert site.function == "Shared.forward"


@pytest.mark.parametrize(
    "model", [timm.create_model("resnet10t"), torchvision.models.resnet18()], ids=["timm", "vision"]
)
def test_lines_of_libraries_of_models_count_as_the_users(model: nn.Module) -> None:
    sites = {str(c.site).split(":")[0] for c in trace(model, torch.randn(2, 3, 32, 32)).calls}
    assert sites == {"resnet.py"}


def test_a_forward_of_the_norms_own_is_not_the_site() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = make("own super().forward")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x)

    (call,) = trace(Net(), example("own super().forward")).calls
    assert call.site is not None
    assert call.site.line == line_of(Net.forward, "self.norm")


def test_a_bare_sequential_has_no_site_and_a_users_closure_is_one() -> None:
    net, x = nn.Sequential(nn.BatchNorm2d(3)), torch.randn(2, 3, 4, 4)
    assert trace(net, x).calls[0].site is None
    site = trace(net, x, forward=lambda model, batch: model(batch)).calls[0].site
    assert site is not None
    assert str(site).startswith("test_trace.py:")


def test_several_calls_of_the_model_in_one_forward_go_on_counting() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3))
    traced = trace(
        net,
        [(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))],
        forward=lambda model, batch: model(batch[0]) + model(batch[1]),
    )
    assert [c.occurrence for c in traced.calls] == [0, 1]


def test_a_layer_that_normalises_in_parts_shows_each() -> None:
    class Ghost(nn.BatchNorm2d):
        """Ghost batch norm: statistics per chunk of the batch."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([super(Ghost, self).forward(part) for part in x.chunk(2)])

    traced = trace(Ghost(3), torch.randn(4, 3, 4, 4), flow="batch")
    assert [(c.occurrence, c.samples) for c in traced.calls] == [(0, 2), (1, 2)]


def test_layers_in_layers_are_told_apart() -> None:
    class Outer(nn.BatchNorm2d):
        """Normalises, and has another norm inside."""

        def __init__(self) -> None:
            super().__init__(3)
            self.inner = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.inner(x))

    assert [c.path for c in trace(Outer(), torch.randn(2, 3, 4, 4)).calls] == ["inner", ""]


def test_functional_norms_that_are_no_layers_are_not_calls() -> None:
    class Standardized(nn.Conv2d):
        """Weight standardisation by F.batch_norm, as timm's StdConv2d."""

        def forward(self, x: Tensor) -> Tensor:
            flat = self.weight.reshape(1, self.out_channels, -1)
            weight = F.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
            return F.conv2d(x, weight, self.bias)

    net = nn.Sequential(Standardized(3, 4, 2), nn.BatchNorm2d(4))
    assert [c.path for c in trace(net, torch.randn(2, 3, 5, 5)).calls] == ["1"]


def test_control_flow_and_checkpointing_are_followed() -> None:
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.odd, self.even = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            layer = self.odd if len(x) % 2 else self.even
            return checkpoint(layer, x, use_reentrant=False)

    batches = [torch.randn(n, 3) for n in (2, 3, 5)]
    assert [c.path for c in trace(Choosy(), batches).calls] == ["even", "odd", "odd"]


def test_an_error_that_the_forward_handles_itself_does_not_confuse() -> None:
    class Forgiving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.picky, self.norm = nn.BatchNorm1d(7), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.picky(x)
            except RuntimeError:
                x = self.norm(x)
            if len(x) == 2:
                raise ZeroDivisionError
            return x

    net = Forgiving()
    assert [c.path for c in trace(net, torch.randn(4, 3)).calls][-1] == "norm"
    with pytest.raises(BatchError, match="after norm: ZeroDivisionError"):
        trace(net, torch.randn(2, 3))


# ------------------------------------------------------------------ compiled, wrapped, scripted


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("error::UserWarning")
def test_compiled_models_are_seen_also_when_compiled_before() -> None:
    net, x = conv_net().eval(), conv_input()
    compiled = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(x)  # from here on, hooks added to the model would not fire
    for model in (compiled, nn.Sequential(compiled)):
        assert len(trace(model, x).calls) == 3
    assert {c.path for c in trace(compiled, x).calls} == {"1", "3.1", "6"}
    net[1].compile(backend="eager")
    assert len(trace(net, x).calls) == 3
    compiled(x)  # no warning about hooks that are gone


def test_data_parallel_paths_are_the_users() -> None:
    wrapped = nn.DataParallel(conv_net())
    assert {c.path for c in trace(wrapped, conv_input()).calls} == {"1", "3.1", "6"}


def test_lazy_layers_are_refused_because_looking_would_change_them() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyBatchNorm2d())
    with pytest.raises(StateError, match="1 is a LazyBatchNorm2d") as caught:
        trace(net, torch.randn(2, 3, 4, 4))
    assert "once" in caught.value.help
    assert type(net[1]) is nn.LazyBatchNorm2d
    net(torch.randn(2, 3, 4, 4))
    assert len(trace(net, torch.randn(2, 3, 4, 4)).calls) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_norms_are_refused_because_nobody_sees_them() -> None:
    with pytest.raises(StateError, match="TorchScript"):
        trace(torch.jit.script(conv_net()), conv_input())


# ------------------------------------------------------------------ the output


class Head(nn.Module):
    """A norm, and something done to its output."""

    def __init__(self, after: Callable[[Tensor], object], norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.BatchNorm2d(3)
        self.after = after

    def forward(self, x: Tensor) -> object:
        return self.after(self.norm(x))


OUTPUTS: dict[str, tuple[Callable[[Tensor], object], bool]] = {
    "itself": (lambda y: y, True),
    "a view": (lambda y: y.view(len(y), -1), True),
    "a view of a view": (lambda y: y.flatten(1)[:, :5], True),
    "in a dict": (lambda y: {"loss": None, "logits": [y]}, True),
    "in an object": (lambda y: inspect.Parameter("y", inspect._KEYWORD_ONLY, default=y), False),
    "activated in place": (lambda y: F.relu_(y), False),
    "viewed, then activated": (lambda y: F.relu_(y.view(-1)), False),
    "activated": (lambda y: F.relu(y), False),
    "pooled": (lambda y: y.mean((2, 3)), False),
    "copied": (lambda y: y.clone(), False),
    "gone, its memory given to another": (lambda y: y.new_ones(y.shape), False),
}


@pytest.mark.parametrize(("after", "expected"), OUTPUTS.values(), ids=OUTPUTS)
def test_is_output(after: Callable[[Tensor], object], expected: bool) -> None:
    for norm in (nn.BatchNorm2d(3), FrozenBatchNorm2d(3)):
        assert trace(Head(after, norm), torch.randn(2, 3, 4, 4)).calls[0].is_output is expected


def test_is_output_of_held_layers_and_of_activated_ones() -> None:
    held = Head(lambda y: y, settle(nn.BatchNorm2d(3)))
    sn.freeze(held)
    assert trace(held, torch.randn(2, 3, 4, 4)).calls[0].is_output
    activated = Head(lambda y: y, make("timm BatchNormAct2d"))
    assert not trace(activated, example("timm BatchNormAct2d")).calls[0].is_output


def test_only_the_norm_that_made_the_output_is_marked() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert [c.is_output for c in trace(net, torch.randn(2, 3, 4, 4)).calls] == [False, True]


def test_on_output_gets_every_output_with_its_batch() -> None:
    batches = [(torch.randn(n, 3), torch.zeros(n)) for n in (2, 5)]
    seen: list[tuple[Tensor, object]] = []
    trace(nn.BatchNorm1d(3), batches, on_output=lambda output, batch: seen.append((output, batch)))
    assert [batch is want for (_, batch), want in zip(seen, batches, strict=True)] == [True, True]
    assert [len(output) for output, _ in seen] == [2, 5]


# ------------------------------------------------------------------ as found


def busy_net() -> nn.Module:
    """A model with everything that could be left changed."""
    net = nn.Sequential(
        conv_net(),
        nn.Dropout(0.5),
        nn.BatchNorm1d(5),
        nn.BatchNorm1d(5, momentum=None),
        nn.BatchNorm1d(5, track_running_stats=False),
        make("1d-flat").__class__(5),
        nn.Unflatten(1, (5, 1)),
        nn.ConstantPad1d((0, 3), 1.0),
        nn.InstanceNorm1d(5, affine=True, track_running_stats=True),
    )
    settle(net)
    net.train()
    net[0][1].eval()
    net[3].track_running_stats = False
    net[0][4].register_forward_hook(lambda *_: None)
    sn.freeze(net, "2")
    net[0](conv_input()).sum().backward()
    return net


FLOWS = ("eval", "batch", "as_is")


@pytest.mark.parametrize("flow", FLOWS)
def test_the_model_is_left_as_found(flow: Any) -> None:
    net = busy_net()
    before = Fingerprint(net)
    trace(net, [conv_input(), conv_input(3)], flow=flow)
    assert not Fingerprint(net).differences(before)


class Bang(BaseException):
    """Not an Exception: as Ctrl-C."""


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, Bang])
def test_the_model_is_left_as_found_wherever_its_forward_raises(
    flow: Any, kind: type[BaseException]
) -> None:
    net = busy_net()
    leaves = [m for m in net.modules() if not list(m.children())]
    for layer in leaves:

        def explode(*_: object) -> None:
            raise kind("here")

        for register in (layer.register_forward_pre_hook, layer.register_forward_hook):
            handle = register(explode)
            before = Fingerprint(net)
            with pytest.raises(BatchError if kind is ValueError else kind):
                trace(net, conv_input(), flow=flow)
            assert not Fingerprint(net).differences(before)
            handle.remove()
    assert not torch.nn.modules.module._has_any_global_hook()
    assert torch.is_grad_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


def test_the_error_of_a_forward_names_batch_layer_and_cause() -> None:
    net = conv_net()
    with pytest.raises(BatchError) as caught:
        trace(net, [conv_input(), torch.randn(2, 3, 9, 9)])
    assert caught.value.fact.startswith("batch 1: the forward raised after 3.1: RuntimeError: mat1")
    assert isinstance(caught.value.__cause__, RuntimeError)
    flat = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm2d(4))
    with pytest.raises(BatchError, match=r"batch 0: the forward raised in 1: ValueError: expected"):
        trace(flat, torch.randn(2, 4))


def test_the_error_of_a_batch_that_does_not_fit_has_the_line_to_copy() -> None:
    x = conv_input()
    with pytest.raises(BatchError) as caught:
        trace(conv_net(), iter([x, (x, x, x)]))
    assert caught.value.fact.startswith("batch 1: a batch is a tuple of 3: (4, 3, 6, 6), ")
    assert caught.value.help == "forward=lambda model, batch: model(batch[0])"


def test_a_graph_recorded_before_still_runs_backward_after() -> None:
    net, x = conv_net().train(), conv_input()
    loss = net(x).square().sum()
    trace(net, x, flow="batch")
    trace(net, x, flow="as_is")
    loss.backward()


def test_gradients_are_not_recorded_inside() -> None:
    outputs: list[Tensor] = []
    trace(conv_net(), conv_input(), on_output=lambda output, _: outputs.append(output))
    assert not outputs[0].requires_grad


def test_tracing_works_within_inference_mode() -> None:
    net = conv_net()
    with torch.inference_mode():
        assert len(trace(net, conv_input(), flow="batch").calls) == 3
