"""Running the user's `predict`: what it is told, what is put back, what its errors become."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diagnosis.nets import conv_net, data, estimated
from stillnorm import check
from stillnorm.diagnosis.evidence import Evidence
from stillnorm.diagnosis.evidence.prediction import Prediction
from stillnorm.diagnosis.evidence.request import Request
from stillnorm.diagnosis.evidence.runs import run_flows
from stillnorm.errors import CallError
from support.fingerprint import Fingerprint


def predicted(net: nn.Module, predict: object, batch: object = None, **how: object) -> Prediction:
    batch = data(8) if batch is None else batch
    request = Request(net, [batch], predict=predict, **how)
    return Evidence(request, run_flows(request, None)).prediction


class Fails(Exception):
    """A mistake of the user's."""


def vandal(model: nn.Module, batch: Tensor) -> Tensor:
    """Test-time training, and everything else that a predict should not do."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torch.enable_grad():
        out = model(batch)
        out.square().mean().backward()
    optimizer.step()
    model[1].momentum, model[1].calls = 0.9, 1
    model[4].running_mean = torch.zeros(8)
    model.register_forward_hook(lambda *a: None)
    model[0].requires_grad_(False)
    batch.zero_()
    random.random()
    np.random.rand()
    return out


@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_put_back(fails: bool) -> None:
    net = estimated(conv_net()).eval()
    net[1].train()

    def predict(model: nn.Module, batch: Tensor) -> Tensor:
        out = vandal(model, batch)
        if fails:
            raise Fails("mine")
        return out

    x = data(8)
    before, values = Fingerprint(net), x.clone()
    numbers = random.getstate(), np.random.get_state()[1].tolist()
    if fails:
        with pytest.raises(CallError, match="predict raised Fails: mine") as raised:
            check(net, x, predict=predict)
        assert isinstance(raised.value.__cause__, Fails)
    else:
        assert check(net, x, predict=predict, select="SN006").findings
    assert before.differences(Fingerprint(net)) == []
    assert torch.equal(x, values)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == numbers


def test_ctrl_c_puts_everything_back_too() -> None:
    net = estimated(conv_net())
    before = Fingerprint(net)

    def predict(model: nn.Module, batch: Tensor) -> Tensor:
        vandal(model, batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check(net, data(8), predict=predict)
    assert before.differences(Fingerprint(net)) == []


def test_what_is_to_be_restored_is() -> None:
    net = estimated(conv_net()).eval()
    ema = nn.Linear(2, 2)

    def predict(model: nn.Module, batch: Tensor) -> Tensor:
        with torch.no_grad():
            ema.weight.add_(1)
        return model(batch)

    before = ema.weight.clone()
    predicted(net, predict, restore=(ema,))
    assert torch.equal(ema.weight, before)


def test_it_is_asked_once_whole_and_once_in_half_when_nothing_differs() -> None:
    sizes = []

    def predict(model: nn.Module, batch: Tensor) -> Tensor:
        sizes.append(len(batch))
        return model.eval()(batch)

    seen = predicted(estimated(conv_net()), predict)
    assert sizes == [8, 4]
    assert seen.mates.changed == ()
    assert (seen.by_batch, seen.moved, seen.gradients, seen.dropout) == ({}, {}, True, False)


def test_it_is_not_asked_where_no_rule_wants_to_know() -> None:
    def predict(model: nn.Module, batch: Tensor) -> Tensor:
        raise AssertionError

    check(conv_net(), data(8), predict=predict, select="SN105")


def test_functional_dropout_is_seen() -> None:
    net = nn.Sequential(estimated(conv_net()).eval())
    assert predicted(net, lambda m, x: nn.functional.dropout(m(x), 0.5, True)).dropout
    assert not predicted(net, lambda m, x: nn.functional.dropout(m(x), 0.5, False)).dropout


def test_a_compiled_model_is_seen_through() -> None:
    net = torch.compile(estimated(conv_net()).train(), backend="eager")
    assert len(predicted(net, lambda model, batch: model(batch)).by_batch) == 2


class TestAnswers:
    """A network in train mode, asked in ways that users have: every answer moves."""

    KINDS = {
        "tensor": lambda out: out,
        "pair": lambda out: (out, out.mean()),
        "mapping": lambda out: {"loss": out.mean(), "logits": out},
        "object": lambda out: SimpleNamespace(loss=None, logits=out, names=["a"]),
        "array": lambda out: out.detach().numpy(),
        "list": lambda out: out.tolist(),
        "floats": lambda out: [x.item() for x in out[:, 0]],
        "time first": lambda out: out[None].expand(5, *out.shape),
        "half": lambda out: out.to(torch.float16),
        "detections": lambda out: [
            {"boxes": row.repeat(i % 3, 1), "labels": torch.arange(i % 3), "mask": row[:2]}
            for i, row in enumerate(out)
        ],
    }

    @pytest.mark.parametrize("kind", KINDS)
    def test_are_compared_sample_by_sample(self, kind: str) -> None:
        shape = self.KINDS[kind]
        net = estimated(conv_net())
        x = data(8)
        seen = predicted(net.train(), lambda model, batch: shape(model(batch)), x)
        assert seen.mates.changed == (0, 1, 2, 3)
        seen = predicted(net, lambda model, batch: shape(model.eval()(batch)), x)
        assert seen.mates.parts
        assert seen.mates.changed == ()

    def test_without_a_part_for_each_sample_say_nothing(self) -> None:
        seen = predicted(estimated(conv_net()), lambda model, batch: float(model(batch).mean()))
        assert (seen.mates, seen.unknown) == (None, "nothing in the answer belongs to one sample")

    def test_of_half_a_batch_may_not_exist(self) -> None:
        seen = predicted(estimated(conv_net()), lambda m, x: m(x.reshape(8, 3, 8, 8)))
        assert seen.mates is None
        assert seen.unknown.startswith("on half of the batch predict raised RuntimeError: shape")

    def test_of_a_batch_that_is_a_mapping(self) -> None:
        batch = {"input": data(8), "names": list("abcdefgh")}
        lengths = []

        def predict(model: nn.Module, batch: dict) -> Tensor:
            lengths.append((len(batch["input"]), len(batch["names"])))
            return model.eval()(batch["input"])

        net = estimated(conv_net())
        seen = predicted(net, predict, batch, forward=lambda m, b: m(b["input"]))
        assert lengths == [(8, 8), (4, 4)]
        assert seen.mates.changed == ()
