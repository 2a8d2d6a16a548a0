"""`eval_mode`, `no_updates`, `preserved`: afterwards everything is as it was, whatever raised."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import stillnorm as sn
from support import layers
from support.fingerprint import Fingerprint, values


class Stop(Exception):
    pass


ENDINGS: list[type[BaseException] | None] = [None, Stop, KeyboardInterrupt]


def raises(ending: type[BaseException] | None) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext() if ending is None else pytest.raises(ending)


class Freezing(nn.Module):
    """mmdetection's `norm_eval`: a `train()` that keeps the norms in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = layers.conv_net()

    def train(self, mode: bool = True) -> Freezing:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Lora(nn.Linear):
    """loralib: eval mode merges the low-rank weights, train mode parts them again."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.weight.requires_grad_(False)
        self.low = nn.Parameter(torch.randn(3, 3))
        self.merged = False

    def train(self, mode: bool = True) -> Lora:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * self.low.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.merged else self.weight + self.low
        return F.linear(x, weight, self.bias)


def flags(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def set_flags(model: nn.Module, wanted: list[bool]) -> None:
    for module, flag in zip(model.modules(), wanted, strict=True):
        module.training = flag


# ------------------------------------------------------------------------------------ eval_mode


@given(st.lists(st.booleans(), min_size=11, max_size=11), st.sampled_from(ENDINGS), st.data())
def test_eval_mode_gives_every_module_its_own_mode_back(
    before: list[bool], ending: type[BaseException] | None, data: st.DataObject
) -> None:
    model = layers.conv_net()
    set_flags(model, before)
    with raises(ending), sn.eval_mode(model) as same:
        assert same is model
        assert not any(flags(model))
        set_flags(model, data.draw(st.lists(st.booleans(), min_size=11, max_size=11)))
        if ending is not None:
            raise ending
    assert flags(model) == before


def test_eval_mode_nests() -> None:
    model = layers.conv_net().train()
    model[1].eval()
    before = flags(model)
    with sn.eval_mode(model):
        model[3].train()
        inner = flags(model)
        with raises(Stop), sn.eval_mode(model):
            raise Stop
        assert flags(model) == inner
    assert flags(model) == before


def test_eval_mode_survives_modules_added_and_removed_inside() -> None:
    model = layers.conv_net().train()
    model[1].eval()
    removed = model[3]
    with sn.eval_mode(model):
        model[3] = nn.Identity()
        model.add_module("added", nn.BatchNorm1d(5).train())
    assert removed.training
    assert removed[1].training
    assert not model[1].training
    assert model.added.training


def test_eval_mode_leaves_held_layers_held_and_unfreeze_gives_the_mode_before() -> None:
    model = layers.conv_net().train()
    sn.freeze(model)
    with sn.eval_mode(model):
        assert not model[1].training
    assert sn.is_frozen(model)
    sn.unfreeze(model)
    assert all(flags(model))


def test_eval_mode_does_not_undo_a_train_method_of_the_models_own() -> None:
    model = Freezing().train()
    model.body[3][1].training = True  # by hand, against the override
    before = flags(model)
    assert not model.body[1].training
    with sn.eval_mode(model):
        assert not any(flags(model))
    assert flags(model) == before


def test_eval_mode_lets_a_train_method_take_back_what_it_did() -> None:
    """Merged LoRA weights in train mode get no gradient; the flag alone would leave them so."""
    model = nn.Sequential(Lora(), nn.BatchNorm1d(3)).train()
    with sn.eval_mode(model):
        assert model[0].merged
    assert not model[0].merged
    model(torch.randn(4, 3)).square().sum().backward()
    assert model[0].low.grad is not None


def test_eval_mode_restores_what_an_inner_train_method_was() -> None:
    """A LoRA layer that was in eval mode inside a model in train mode is merged again."""
    model = nn.Sequential(Lora(), nn.BatchNorm1d(3)).train()
    model[0].eval()
    with sn.eval_mode(model):
        pass
    assert not model[0].training
    assert model[0].merged
    assert model.training


def test_eval_mode_restores_every_flag_though_a_train_method_raises() -> None:
    class Refusing(nn.Linear):
        def train(self, mode: bool = True) -> Refusing:
            if mode:
                raise Stop
            return super().train(mode)

    model = nn.Sequential(nn.BatchNorm1d(3), Refusing(3, 3), nn.BatchNorm1d(3))
    set_flags(model, [True, True, True, True])
    with raises(Stop), sn.eval_mode(model):
        pass
    assert flags(model) == [True] * 4


def test_eval_mode_restores_every_flag_though_eval_raises_halfway() -> None:
    class Refusing(nn.Linear):
        def train(self, mode: bool = True) -> Refusing:
            if not mode:
                raise Stop
            return super().train(mode)

    model = nn.Sequential(nn.BatchNorm1d(3), Refusing(3, 3), nn.BatchNorm1d(3)).train()
    with raises(Stop), sn.eval_mode(model):
        pytest.fail("the block runs in a model that is not in eval mode")
    assert flags(model) == [True] * 4


def test_eval_mode_takes_a_part_that_torchscript_has_frozen() -> None:
    """Such a module has no `training`."""
    part = torch.jit.freeze(torch.jit.script(nn.Sequential(nn.BatchNorm1d(3)).eval()))
    model = nn.Sequential(nn.BatchNorm1d(3))
    model.add_module("part", part)
    model.training = model[0].training = True
    with sn.eval_mode(model):
        assert not model[0].training
    assert model.training
    assert model[0].training


# ----------------------------------------------------------------------------------- no_updates


class Rebinding(nn.BatchNorm2d):
    """The tutorials' own batch norm: new tensors instead of writes, whatever the flags say."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            with torch.no_grad():
                self.running_mean = 0.9 * self.running_mean + 0.1 * mean
                self.running_var = 0.9 * self.running_var + 0.1 * var
                self.num_batches_tracked += 1
        else:
            mean, var = self.running_mean, self.running_var
        y = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + self.eps)
        return y * self.weight[:, None, None] + self.bias[:, None, None]


NORMS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    name: lambda name=name: (layers.make(name), layers.example(name)) for name in layers.CASES
} | {
    "rebinding": lambda: (layers.settle(Rebinding(4)), torch.randn(3, 4, 5, 6)),
    "statistics off": lambda: (
        nn.BatchNorm2d(4, track_running_stats=False),
        torch.randn(3, 4, 5, 6),
    ),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_no_updates_normalises_as_before_and_updates_nothing(name: str, training: bool) -> None:
    layer, x = NORMS[name]()
    layer.train(training)
    expected = copy.deepcopy(layer)(x)
    before = Fingerprint(layer, versions=False)
    with sn.no_updates(layer):
        actual = layer(x)
    assert torch.equal(actual, expected)
    assert Fingerprint(layer, versions=False).differences(before) == []


@pytest.mark.parametrize("ending", ENDINGS)
def test_no_updates_ends_when_the_block_does(ending: type[BaseException] | None) -> None:
    model = layers.conv_net().train()
    with raises(ending), sn.no_updates(model):
        model(layers.conv_input())
        if ending is not None:
            raise ending
    assert all(m.track_running_stats for m in model.modules() if hasattr(m, "running_mean"))
    before = model[1].running_mean.clone()
    model(layers.conv_input())
    assert not torch.equal(model[1].running_mean, before)


def test_no_updates_is_about_the_selected_layers_only() -> None:
    model = layers.conv_net().train()
    before = values(model)
    with sn.no_updates(model, "3"):
        model(layers.conv_input())
    moved = {name for name, bits in values(model).items() if bits != before[name]}
    assert moved == {
        f"{n}.{t}"
        for n in ("1", "6")
        for t in ("running_mean", "running_var", "num_batches_tracked")
    }


def test_no_updates_nests() -> None:
    model = layers.conv_net().train()
    before = values(model)
    with sn.no_updates(model):
        with sn.no_updates(model, "1"):
            model(layers.conv_input())
        model(layers.conv_input())
    assert values(model) == before
    assert model[1].track_running_stats


def test_no_updates_keeps_out_an_infinity_that_momentum_zero_lets_through() -> None:
    x = torch.full((4, 2), torch.inf)
    momentum_zero, paused = nn.BatchNorm1d(2, momentum=0.0), nn.BatchNorm1d(2)
    momentum_zero(x)
    with sn.no_updates(paused):
        paused(x)
    assert momentum_zero.running_mean.isnan().all()
    assert torch.equal(paused.running_mean, torch.zeros(2))


def test_no_updates_lets_graphs_recorded_inside_run_backward_outside() -> None:
    """The second forward of SAM: gradients are those of a plain forward."""
    for name in NORMS:
        layer, x = NORMS[name]()
        layer.train()
        plain = copy.deepcopy(layer)
        x = x.requires_grad_()
        (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
        with sn.no_updates(layer):
            loss = layer(x).square().sum()
        (actual,) = torch.autograd.grad(loss, x)
        assert torch.equal(actual, expected), name


def test_no_updates_covers_checkpointed_blocks_whose_backward_is_inside() -> None:
    layer, x = layers.make("2d").train(), layers.example("2d").requires_grad_()
    before = values(layer)
    with sn.no_updates(layer):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert values(layer) == before


def test_no_updates_leaves_a_lazy_layers_statistics_initial() -> None:
    model = nn.Sequential(nn.LazyBatchNorm2d(), nn.LazyInstanceNorm2d(track_running_stats=True))
    with sn.no_updates(model):
        model(torch.randn(4, 3, 5, 5) + 7)
    for layer in model:
        assert torch.equal(layer.running_mean, torch.zeros(3))
        assert torch.equal(layer.running_var, torch.ones(3))
        assert int(layer.num_batches_tracked) == 0
        assert layer.track_running_stats


def test_no_updates_with_frozen_and_held_layers() -> None:
    model = layers.conv_net().train()
    sn.freeze(model, "1")
    before = values(model)
    with sn.no_updates(model):
        model(layers.conv_input())
    assert values(model) == before
    assert sn.is_frozen(model, "1")
    assert not sn.is_frozen(model, "3")


def test_no_updates_under_compile() -> None:
    model = layers.conv_net().train()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(layers.conv_input())
    before = values(model)
    with sn.no_updates(compiled):
        compiled(layers.conv_input())
    assert values(model) == before
    compiled(layers.conv_input())
    assert values(model) != before


# ------------------------------------------------------------------------------------ preserved


def prepared() -> nn.Sequential:
    """A network with all there is to lose: gradients, hooks, odd modes and settings, a hold."""
    model = layers.conv_net().train()
    model(layers.conv_input()).square().sum().backward()
    sn.freeze(model, "3")
    model[0].weight.requires_grad_(False)
    model[6].eval()
    model[6].momentum = 0.3
    model[0].register_buffer("average", torch.randn(3))
    model[1].register_forward_hook(lambda *a: None)
    model[1].register_forward_pre_hook(lambda *a, **k: None, with_kwargs=True)
    model.register_forward_hook(lambda *a: None, always_call=True)
    return model


ACTIONS: dict[str, Callable[[nn.Sequential], object]] = {
    "train and eval": lambda m: (m.eval(), m[1].train(), m.train(), m[3].eval()),
    "forward": lambda m: m.train()(layers.conv_input()),
    "backward": lambda m: m.train()(layers.conv_input()).square().sum().backward(),
    "gradients dropped": lambda m: m.zero_grad(),
    "gradients zeroed": lambda m: m.zero_grad(set_to_none=False),
    "requires_grad": lambda m: m.requires_grad_(True),
    "no requires_grad": lambda m: m.requires_grad_(False),
    "settings": lambda m: [
        setattr(m[1], n, v) for n, v in (("momentum", None), ("eps", 1.0), ("extra", 1))
    ],
    "track_running_stats": lambda m: setattr(m[1], "track_running_stats", False),
    "statistics written": lambda m: m[1].running_mean.fill_(9),
    "statistics replaced": lambda m: setattr(m[1], "running_mean", torch.ones(4)),
    "statistics removed": lambda m: setattr(m[1], "running_var", None),
    "statistics reset": lambda m: [m[i].reset_running_stats() for i in (1, 6)],
    "affine reset": lambda m: [m[i].reset_parameters() for i in (1, 6)],
    "affine data replaced": lambda m: setattr(m[1].weight, "data", torch.full((4,), 5.0)),
    "buffer added": lambda m: m[1].register_buffer("extra", torch.ones(1)),
    "frozen": lambda m: sn.freeze(m),
    "frozen, affine trains": lambda m: sn.freeze(m, affine="trains"),
    "unfrozen": lambda m: sn.unfreeze(m),
    "unfrozen and frozen": lambda m: (sn.unfreeze(m), m.train(), sn.freeze(m)),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "double forward": lambda m: m.double().train()(layers.conv_input().double()).sum().backward(),
    "hook added": lambda m: m[1].register_forward_hook(lambda *a: None, prepend=True),
    "full backward hook": lambda m: m[1].register_full_backward_hook(lambda *a: None),
    "hooks cleared": lambda m: m[1]._forward_hooks.clear(),
    "hooks replaced": lambda m: setattr(m[1], "_forward_hooks", type(m[1]._forward_hooks)()),
    "hooks of another module replaced": lambda m: setattr(
        m[0], "_forward_hooks", type(m[0]._forward_hooks)()
    ),
    "full backward hook on another": lambda m: m[0].register_full_backward_hook(lambda *a: None),
    "another module's buffer written": lambda m: m[0].average.mul_(2),
    "hooks reordered": lambda m: m[1]._forward_hooks.move_to_end(next(iter(m[1]._forward_hooks))),
    "random numbers": lambda m: torch.rand(3),
    "seed": lambda m: torch.manual_seed(9),
    "train override": lambda m: setattr(m[1], "train", lambda mode=True: m[1]),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", ACTIONS)
def test_preserved_undoes(name: str, ending: type[BaseException] | None) -> None:
    model = prepared()
    model[1].register_forward_hook(lambda *a: None)
    before = Fingerprint(model)
    with raises(ending), sn.preserved(model) as same:
        assert same is model
        ACTIONS[name](model)
        if ending is not None:
            raise ending
    assert Fingerprint(model).differences(before) == []


@given(st.lists(st.sampled_from(sorted(ACTIONS)), max_size=5), st.sampled_from(ENDINGS))
def test_preserved_undoes_any_sequence(
    names: list[str], ending: type[BaseException] | None
) -> None:
    model = prepared()
    before = Fingerprint(model)
    # Some sequences make no sense to torch, which raises: all the better.
    with contextlib.suppress(Exception, KeyboardInterrupt), sn.preserved(model):
        for name in names:
            ACTIONS[name](model)
        if ending is not None:
            raise ending
    assert Fingerprint(model).differences(before) == []


def test_preserved_nests() -> None:
    model = prepared()
    before = Fingerprint(model)
    with sn.preserved(model):
        model.eval()
        model[1].momentum = 0.9
        middle = Fingerprint(model)
        with raises(Stop), sn.preserved(model):
            model.train()(layers.conv_input())
            sn.freeze(model)
            raise Stop
        assert Fingerprint(model).differences(middle) == []
    assert Fingerprint(model).differences(before) == []


def test_preserved_leaves_outstanding_graphs_usable() -> None:
    """A loss computed before the block has the gradients that it would have had."""
    for kind in ("train", "eval"):
        model, plain = layers.conv_net(), layers.conv_net()
        losses = []
        for net in (model, plain):
            getattr(net, kind)()
            losses.append(net(layers.conv_input()).square().sum())
        with sn.preserved(model):
            model.train()
            model(layers.conv_input(seed=5)).sum().backward()
            model[1].running_var.mul_(2)
        for loss in losses:
            loss.backward()
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours.grad, theirs.grad)


def test_preserved_keeps_the_random_states_of_python_and_numpy() -> None:
    model = layers.conv_net()
    python, numpy = random.getstate(), np.random.get_state()[1].tolist()
    with raises(Stop), sn.preserved(model):
        random.random()
        np.random.rand()
        raise Stop
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == numpy


def test_preserved_leaves_lazy_modules_lazy_and_working() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(2))
    before = Fingerprint(model)
    with sn.preserved(model):
        model(torch.randn(2, 3, 6, 6))
        assert type(model[1]) is nn.BatchNorm2d
    assert Fingerprint(model).differences(before) == []
    assert model(torch.randn(2, 5, 8, 8)).shape == (2, 2)  # other sizes than inside
    assert type(model[1]) is nn.BatchNorm2d


def test_preserved_takes_a_lazy_model_that_stays_lazy() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d())
    before = Fingerprint(model)
    with sn.preserved(model):
        model.eval()
    assert Fingerprint(model).differences(before) == []


def test_preserved_takes_back_merged_lora_weights_to_the_bit() -> None:
    model = nn.Sequential(Lora(), nn.BatchNorm1d(3)).train()
    before = Fingerprint(model)
    with sn.preserved(model):
        model.eval()
        assert model[0].merged
    assert Fingerprint(model).differences(before) == []


def test_preserved_takes_torchscript_models() -> None:
    model = torch.jit.script(layers.conv_net().train())
    before = values(model)
    with sn.preserved(model):
        model.eval()
        model.train()
        model(layers.conv_input())
        assert values(model) != before
    assert values(model) == before
    assert all(module.training for module in model.modules())


def test_preserved_takes_buffers_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = layers.conv_net().train()
    before = values(model)
    with sn.preserved(model), torch.inference_mode():
        model(layers.conv_input())
        assert values(model) != before
    assert values(model) == before


def test_preserved_lets_an_optimizer_step_on_other_parameters_stay() -> None:
    """What its docstring says it does not keep."""
    model = layers.conv_net().train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    before = values(model)
    with sn.preserved(model):
        model(layers.conv_input()).square().sum().backward()
        optimizer.step()
    moved = {name for name, bits in values(model).items() if bits != before[name]}
    assert {"0.weight", "3.0.weight", "5.weight"} <= moved
    assert not any(name.startswith(("1.", "3.1.", "6.")) for name in moved)
