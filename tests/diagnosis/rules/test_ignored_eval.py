"""SN007: every way in which `eval()` does not reach a norm, and what only looks like one."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diagnosis.nets import batches, conv_net, data, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis import Finding
from support.fingerprint import Fingerprint
from support.zoo import images, timm


def findings(net: nn.Module, inputs: object = None, **how: object) -> list[Finding]:
    report = check(net, batches() if inputs is None else inputs, select="SN007", **how)
    assert not report.crashed, report.crashed
    assert not report.not_run
    return list(report.findings)


def line_of(function: Callable[..., object], text: str) -> str:
    lines, first = inspect.getsourcelines(function)
    number = first + next(i for i, line in enumerate(lines) if text in line)
    return f"test_ignored_eval.py:{number}"


class Block(nn.Module):
    """A convolution, and a norm of some kind in `norm`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def norm(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


class Function(Block):
    """MAML's way: statistics in buffers, `training=True` written out."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=True)


class Aten(Block):
    def norm(self, x: Tensor) -> Tensor:
        return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


class Native(Block):
    def norm(self, x: Tensor) -> Tensor:
        return torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0]


class PlainList(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norms = [nn.BatchNorm2d(4)]

    def norm(self, x: Tensor) -> Tensor:
        return self.norms[0](x)


class BlocksInList(Block):
    """Not the norm itself but what holds it is in a plain dict."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = {"a": nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))}

    def norm(self, x: Tensor) -> Tensor:
        return self.blocks["a"](x)


class BuiltInForward(Block):
    def norm(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d(4)(x)


class Registered(Block):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def norm(self, x: Tensor) -> Tensor:
        return self.bn(x)


class Stubborn(nn.BatchNorm2d):
    """A subclass whose forward sets eval mode aside."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=True)


class NotPassedOn(Registered):
    def train(self, mode: bool = True) -> NotPassedOn:
        self.training = mode
        return self


class NoReturn(Registered):
    def train(self, mode: bool = True) -> None:
        super().train(mode)


@pytest.mark.parametrize("kind", [Function, Aten, Native])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_a_function_with_training_written_out(kind: type[Block], depth: int) -> None:
    net: nn.Module = kind()
    for _ in range(depth):
        net = nn.Sequential(net)
    (finding,) = findings(net)
    assert (finding.severity, finding.evidence["kind"]) == ("error", "function")
    assert finding.paths == (".".join("0" * depth),)
    assert finding.where == (line_of(kind.norm, "batch_norm("),)
    assert [site.function for site in finding.sites] == [f"{kind.__name__}.norm"]


@pytest.mark.parametrize("kind", [PlainList, BlocksInList])
def test_a_norm_that_the_model_does_not_know(kind: type[Block]) -> None:
    (finding,) = findings(kind())
    assert finding.evidence == {"kind": "unregistered", "calls": 1}
    assert "BatchNorm2d" in finding.message
    assert finding.where == (line_of(kind.norm, "return"),)


def test_a_norm_built_in_forward() -> None:
    (finding,) = findings(BuiltInForward())
    assert finding.evidence["kind"] == "built in forward"


def test_a_train_that_does_not_pass_the_mode_on() -> None:
    (finding,) = findings(nn.Sequential(NotPassedOn(), nn.Linear(4, 2)))
    assert (finding.paths, finding.evidence["kind"]) == (("0.bn",), "train override")
    assert "NotPassedOn.train() does not pass the mode on" in finding.message


def test_an_eval_that_does_nothing() -> None:
    class Stays(Block):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(4)

        def norm(self, x: Tensor) -> Tensor:
            return self.bn(x)

        def eval(self) -> Stays:
            return self

    (finding,) = findings(Stays())
    assert "Stays.eval() does not pass the mode on" in finding.message
    assert finding.help == "end Stays.eval() with: return super().eval()"


def test_a_subclass_that_sets_eval_mode_aside() -> None:
    net = conv_net()
    net[1] = Stubborn(8)
    (finding,) = findings(net)
    assert (finding.paths, finding.evidence["kind"]) == (("1",), "forward")


def test_a_train_without_return() -> None:
    (finding,) = findings(estimated(NoReturn()))
    assert finding.evidence["kind"] == "no return"
    assert NoReturn().eval() is None


def test_it_explains_statistics_that_eval_mode_does_not_use() -> None:
    net = estimated(conv_net())
    net[1] = Stubborn(8)
    net[1].running_mean += 9
    report = check(net, batches(), select="SN007,SN105")
    assert [(f.code, f.explains) for f in report.findings] == [
        ("SN007", "SN105 on 1 (not repeated)")
    ]


class MetaLearner(nn.Module):
    """Two inputs, and a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Function()

    def forward(self, support: Tensor, query: Tensor) -> Tensor:
        return self.net(support) + self.net(query)


def test_several_inputs_through_forward() -> None:
    pairs = [{"a": data(8), "b": data(8, seed=2)}]
    (finding,) = findings(MetaLearner(), pairs, forward=lambda net, x: net(x["a"], x["b"]))
    assert (finding.paths, finding.evidence["calls"]) == (("net",), 2)


def test_outputs_do_depend_on_the_batch_mates() -> None:
    x = data(8)
    for net in (Function().eval(), PlainList().eval(), BuiltInForward().eval()):
        assert not torch.allclose(net(x)[:4], net(x[:4]), atol=1e-3)
    fine = estimated(Registered()).eval()
    torch.testing.assert_close(fine(x)[:4], fine(x[:4]))


@pytest.mark.parametrize("kind", [Function, PlainList, BlocksInList, NotPassedOn, NoReturn])
def test_the_model_is_left_as_found(kind: type[Block]) -> None:
    net = kind()
    hidden = list(getattr(net, "norms", []))
    hidden += [m for block in getattr(net, "blocks", {}).values() for m in block]
    before = [Fingerprint(m) for m in (net, *hidden)]
    check(net, batches())
    assert [Fingerprint(m) for m in (net, *hidden)] == before


class Masked(Block):
    """The flag is the model's own, as it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def norm(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class Standardised(Registered):
    """Weight standardisation by batch norm, of the weight times a gain."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.conv.weight * self.gain).reshape(1, 4, -1).expand(2, -1, -1)
        weight = F.batch_norm(weight, None, None, training=True)[0].view_as(self.conv.weight)
        return self.bn(F.conv2d(x, weight)).relu().mean((2, 3))


class Folded(Block):
    """Instance norm by batch norm, samples folded into the channels (MUNIT's AdaIN)."""

    def norm(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        return F.batch_norm(x.reshape(1, n * c, *x.shape[2:]), None, None, training=True).view_as(x)


class TestNearMisses:
    @pytest.mark.parametrize("kind", [Registered, Masked, Standardised, Folded])
    def test_what_eval_does_reach(self, kind: type[Block]) -> None:
        assert findings(kind()) == []

    def test_timms_standardised_convolutions(self) -> None:
        """They call F.batch_norm(training=True) on their weights."""
        net = timm.create_model("nf_resnet26", num_classes=4)
        assert findings(net, images(2, size=32)) == []

    def test_instance_norm_and_its_function(self) -> None:
        class Instance(Block):
            def norm(self, x: Tensor) -> Tensor:
                return F.instance_norm(x)

        net = conv_net()
        net[1] = nn.InstanceNorm2d(8)
        assert findings(net) == findings(Instance()) == []

    def test_a_registered_layer_without_statistics(self) -> None:
        assert findings(conv_net(track_running_stats=False)) == []

    def test_a_train_that_holds_its_norms(self) -> None:
        class NormEval(Registered):
            def train(self, mode: bool = True) -> NormEval:
                super().train(mode)
                self.bn.eval()
                return self

        assert findings(estimated(NormEval())) == []

    def test_held_layers(self) -> None:
        net = estimated(conv_net())
        freeze(net)
        assert findings(net.train()) == []

    def test_a_plain_list_that_is_set_to_eval_by_hand(self) -> None:
        net = PlainList()
        net.norms[0].eval()
        assert findings(net) == []
