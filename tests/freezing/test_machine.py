"""Any sequence of what users do to a model: what is held never moves, and comes back as it was.

A twin that is never frozen hears the same `train()` and `eval()` calls: its flags are what
`unfreeze` must give. The rest of the expectation is a few lines of bookkeeping.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor, nn

import stillnorm as sn
from stillnorm.norms import find_norms, hold_of
from support import layers
from support.fingerprint import bits

KINDS = (
    "2d",
    "affine=False",
    "momentum=None",
    "instance2d",
    "subclass",
    "own F.batch_norm",
    "own super().forward",
    "own train()",
    "own sticky train()",
    "own formula",
)
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
AFFINE = ("weight", "bias")
PATHS = ("", "0", "1", "2", "2.0", "3")  # of modules
NORMS = ("1", "2.0", "3")  # of norm layers


class Hold:
    """What the machine knows of one layer."""

    def __init__(self) -> None:
        self.affine: str | None = None  # None: not held
        self.expected: dict[str, Tensor] = {}
        self.requires_grad = {"weight": True, "bias": True}  # were it not held


class Machine(RuleBasedStateMachine):
    @initialize(
        kinds=st.tuples(*[st.sampled_from(KINDS)] * 3),
        optimizer=st.sampled_from(["SGD", "Adam"]),
        seed=st.integers(0, 1000),
    )
    def build(self, kinds: tuple[str, str, str], optimizer: str, seed: int) -> None:
        torch.manual_seed(seed)
        one, two, three = (layers.make(kind, seed + i) for i, kind in enumerate(kinds))
        self.net: nn.Module = nn.Sequential(
            nn.Conv2d(4, 4, 1), one, nn.Sequential(two, nn.ReLU()), three
        )
        self.twin = copy.deepcopy(self.net)
        self.kind = optimizer
        self.holds = {path: Hold() for path in NORMS}
        self.seed = seed
        self._new_optimizer()

    # ---------------------------------------------------------------- helpers

    def _new_optimizer(self) -> None:
        parameters = self.net.parameters()
        if self.kind == "SGD":
            self.optimizer: Any = torch.optim.SGD(parameters, 1e-4, momentum=0.9, weight_decay=0.1)
        else:
            self.optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.5)

    def _x(self) -> Tensor:
        self.seed += 1
        g = torch.Generator().manual_seed(self.seed)
        dtype = next(self.net.parameters()).dtype
        return (3 * torch.randn(3, 4, 5, 6, generator=g) + 1).to(dtype)

    def _norm(self, path: str) -> nn.Module:
        return self.net.get_submodule(path)

    def _note(self, path: str) -> None:
        """What must not move from here on."""
        hold, layer = self.holds[path], self._norm(path)
        names = STATISTICS + (AFFINE if hold.affine == "frozen" else ())
        tensors = {name: getattr(layer, name) for name in names}
        hold.expected = {k: t.detach().clone() for k, t in tensors.items() if t is not None}

    # ---------------------------------------------------------------- verbs

    @rule(path=st.sampled_from(NORMS), affine=st.sampled_from(["frozen", "trains"]))
    def freeze(self, path: str, affine: str) -> None:
        report = sn.freeze(self.net, path, affine=affine)  # type: ignore[arg-type]
        hold = self.holds[path]
        assert report.refused == ()
        assert bool(report.frozen) is (hold.affine != affine)
        hold.affine = affine
        self._note(path)

    @rule(path=st.sampled_from(NORMS))
    def unfreeze(self, path: str) -> None:
        report = sn.unfreeze(self.net, path)
        hold, layer = self.holds[path], self._norm(path)
        assert bool(report.unfrozen) is (hold.affine is not None)
        hold.affine = None
        assert type(layer) is type(self.twin.get_submodule(path))
        assert layer.training is self.twin.get_submodule(path).training
        for name in AFFINE:
            if getattr(layer, name) is not None:
                assert getattr(layer, name).requires_grad is hold.requires_grad[name]

    # ---------------------------------------------------------------- modes

    @rule(path=st.sampled_from(PATHS), mode=st.booleans())
    def train(self, path: str, mode: bool) -> None:
        for model in (self.net, self.twin):
            module = model.get_submodule(path)
            assert module.train(mode) is module

    @rule(path=st.sampled_from(PATHS))
    def training_written_directly(self, path: str) -> None:
        for model in (self.net, self.twin):
            model.get_submodule(path).training = True

    @rule(on=st.booleans(), path=st.sampled_from(NORMS))
    def requires_grad(self, path: str, on: bool) -> None:
        hold, layer = self.holds[path], self._norm(path)
        if isinstance(layer, layers.FormulaNorm):
            return  # it reads its weight itself: what the user switches on is on
        if hold.affine == "frozen" and not on:
            return  # off is what freeze made it: the user's word cannot be told from ours
        layer.requires_grad_(on)
        for name in AFFINE:
            if getattr(layer, name) is not None:
                hold.requires_grad[name] = on

    # ---------------------------------------------------------------- training

    @rule(to_none=st.booleans(), backward=st.booleans(), step=st.booleans())
    def training_step(self, to_none: bool, backward: bool, step: bool) -> None:
        self.optimizer.zero_grad(set_to_none=to_none)
        y = self.net(self._x().requires_grad_())
        if backward:
            y.float().square().mean().backward()
        if step:
            self.optimizer.step()

    @rule()
    def stale_step(self) -> None:
        self.optimizer.step()

    @rule(manager=st.sampled_from(["no_updates", "eval_mode", "preserved"]), wake=st.booleans())
    def inside(self, manager: str, wake: bool) -> None:
        flags = [m.training for m in self.net.modules()]
        with getattr(sn, manager)(self.net):
            if wake:
                self.net.train()
            self.net(self._x().requires_grad_())
        if not (wake and manager == "no_updates"):
            # A held layer's flag may have been written past train(); a forward takes that back.
            now = [m.training for m in self.net.modules()]
            held = [hold_of(m) is not None for m in self.net.modules()]
            for before, after, is_held in zip(flags, now, held, strict=True):
                assert before == after or (is_held and not after)
        else:
            self.twin.train()

    # ---------------------------------------------------------------- copies, files, casts

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def replace_by_copy(self, how: str) -> None:
        if how == "deepcopy":
            self.net = copy.deepcopy(self.net)
        elif how == "pickle":
            self.net = pickle.loads(pickle.dumps(self.net))
        else:
            buffer = io.BytesIO()
            torch.save(self.net, buffer)
            buffer.seek(0)
            self.net = torch.load(buffer, weights_only=False)
        self._new_optimizer()

    @rule(assign=st.booleans())
    def load_state_dict(self, assign: bool) -> None:
        state = {k: t.clone() for k, t in self.net.state_dict().items()}
        self.seed += 1
        g = torch.Generator().manual_seed(self.seed)
        for tensor in state.values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=g) + 0.5)
        self.net.load_state_dict(state, strict=True, assign=assign)
        if assign:
            self._new_optimizer()
        for path in NORMS:
            self._note(path)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    def cast(self, dtype: torch.dtype) -> None:
        self.net.to(dtype)
        for hold in self.holds.values():
            for name, tensor in hold.expected.items():
                if tensor.is_floating_point():
                    hold.expected[name] = tensor.to(dtype)
        self._new_optimizer()

    # ---------------------------------------------------------------- promises

    @invariant()
    def what_is_held_did_not_move(self) -> None:
        for path, hold in self.holds.items() if hasattr(self, "holds") else ():
            if hold.affine is None:
                continue
            for name, expected in hold.expected.items():
                assert bits(getattr(self._norm(path), name)) == bits(expected), (path, name)

    @invariant()
    def is_frozen_says_what_is_held(self) -> None:
        for path, hold in self.holds.items() if hasattr(self, "holds") else ():
            sticky = isinstance(self._norm(path), layers.StickyNorm)
            assert sn.is_frozen(self.net, path) is (sticky or hold.affine is not None)

    @invariant()
    def flags_of_the_others_are_the_twins(self) -> None:
        if not hasattr(self, "holds"):
            return
        for (path, a), b in zip(self.net.named_modules(), self.twin.modules(), strict=True):
            if path not in self.holds or self.holds[path].affine is None:
                assert a.training is b.training, path

    @rule()
    def held_all_over_is_one_function_in_train_and_eval(self) -> None:
        """And it is that of the plain network in eval mode, bit for bit."""
        if any(hold.affine is None for hold in self.holds.values()):
            return
        x = self._x()
        plain = copy.deepcopy(self.net)
        sn.unfreeze(plain)
        expected = plain.eval()(x)
        assert bits(copy.deepcopy(self.net).train()(x)) == bits(expected)
        assert bits(copy.deepcopy(self.net).eval()(x)) == bits(expected)
        assert [type(n.module) for n in find_norms(plain)] == [
            type(n.module) for n in find_norms(self.twin)
        ]


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestMachine = Machine.TestCase
