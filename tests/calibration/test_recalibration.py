"""What recalibrate changes, what it leaves alone, and what it says about both."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import stillnorm as sn
from calibration.received import assert_exact, assert_statistics, recording
from stillnorm import recalibrate
from stillnorm.errors import BatchError, CalibrationError, ModelError, SelectorError, StateError
from support.fingerprint import Fingerprint, values
from support.layers import CASES, conv_input, conv_net, example, make
from support.oracles import pooled_moments
from support.zoo import torchvision


def batches() -> list[Tensor]:
    return [conv_input(n, seed=n) for n in (5, 4, 2)]


def changed(net: nn.Module, before: dict[str, object]) -> set[str]:
    now = values(net)
    return {name for name in now if now[name] != before[name]}


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


# ------------------------------------------------------------------ which layers


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_layer_is_recalibrated_on_what_it_receives(name: str) -> None:
    layer = make(name)
    x = example(name)
    recalibrate(layer, x, layers=layer)
    if name.startswith("instance"):
        flat = x.double().flatten(2)
        mean, var = flat.mean(2).mean(0), flat.var(2).mean(0)
    else:
        mean, var = pooled_moments([x])
    assert_statistics(layer, mean, var)
    assert layer.num_batches_tracked == (7 if name.startswith("instance") else 8)


@pytest.mark.parametrize("mode", [True, False])
def test_the_present_mode_does_not_matter(mode: bool) -> None:
    net = conv_net().train(mode)
    with recording(net) as received:
        report = recalibrate(net, batches())
    assert [layer.path for layer in report.layers] == ["1", "3.1", "6"]
    assert_exact(received)
    assert all(module.training is mode for module in net.modules())


def test_a_layer_put_in_eval_by_hand_is_not_held() -> None:
    net = conv_net().train()
    net[1].eval()
    assert len(recalibrate(net, batches()).layers) == 3
    assert not net[1].training


def test_only_selected_layers_change_and_the_rest_runs_in_eval_mode() -> None:
    net = conv_net()
    before = values(net)
    with recording(net) as received:
        report = recalibrate(net, batches(), layers="3")
    assert [layer.path for layer in report.layers] == ["3.1"]
    assert changed(net, before) == {f"3.1.{name}" for name in STATISTICS}
    inputs = received[net[3][1]]
    assert_statistics(net[3][1], *pooled_moments(inputs))
    assert torch.equal(inputs[0], net[3][0](net[:3].eval()(batches()[0])))


def test_weights_stay() -> None:
    net = conv_net()
    before = values(net)
    recalibrate(net, batches())
    assert {name.rsplit(".")[-1] for name in changed(net, before)} == set(STATISTICS)


def test_held_layers_are_left_alone_and_listed() -> None:
    net = conv_net()
    sn.freeze(net, "1")
    before = values(net)
    report = recalibrate(net, batches())
    assert report.held == ("1",)
    assert [layer.path for layer in report.layers] == ["3.1", "6"]
    assert not {name for name in changed(net, before) if name.startswith("1.")}


def test_held_layers_that_are_named_get_statistics_and_stay_held() -> None:
    net = conv_net()
    sn.freeze(net)
    with recording(net) as received:
        report = recalibrate(net, batches(), layers=["1", "3"])
    assert report.held == ()
    assert [layer.path for layer in report.layers] == ["1", "3.1"]
    for layer in (net[1], net[3][1]):
        assert_statistics(layer, *pooled_moments(received[layer]))
    assert sn.is_frozen(net)


def test_held_layers_normalise_by_their_running_statistics_meanwhile() -> None:
    net, plain = conv_net(), conv_net()
    sn.freeze(net)
    with recording(net) as received:
        recalibrate(net, batches(), layers="*")
    assert torch.equal(received[net[6]][0], plain[:6].eval()(batches()[0]))


class NormEval(nn.Module):
    """mmdetection's norm_eval: the model's own train() holds its norms."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = conv_net()[:4], nn.BatchNorm2d(6)

    def train(self, mode: bool = True) -> NormEval:
        super().train(mode)
        for module in self.body.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_layers_held_by_the_models_own_train_are_left_alone() -> None:
    net = NormEval().train()
    before = values(net)
    report = recalibrate(net, batches())
    assert report.held == ("body.1", "body.3.1")
    assert changed(net, before) == {f"head.{name}" for name in STATISTICS}
    assert [layer.path for layer in recalibrate(net, batches(), "body").layers] == [
        "body.1",
        "body.3.1",
    ]


def test_another_librarys_frozen_layers_are_left_alone_unless_named() -> None:
    net = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(3), nn.BatchNorm2d(3))
    assert recalibrate(net, conv_input()).held == ("0",)
    recalibrate(net, conv_input(), layers="0")
    assert_statistics(net[0], *pooled_moments([conv_input()]))


def test_toggled_tracking_is_recalibrated_and_stays_toggled() -> None:
    layer = nn.BatchNorm2d(3).train()
    layer.track_running_stats = False
    recalibrate(layer, conv_input())
    assert_statistics(layer, *pooled_moments([conv_input()]))
    assert layer.track_running_stats is False


def test_unreached_layers_keep_theirs_and_are_listed() -> None:
    class Auxiliary(nn.Module):
        """As Inception's auxiliary head: called in training only."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.aux = make("2d"), make("2d")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.aux(x) if self.training else self.norm(x)

    net = Auxiliary().train()
    before = values(net)
    report = recalibrate(net, example("2d"))
    assert report.unreached == ("aux",)
    assert changed(net, before) == {f"norm.{name}" for name in STATISTICS}


# ------------------------------------------------------------------ refusals


def test_layers_without_statistics_are_refused_with_the_reason() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3))
    report = recalibrate(net, conv_input())
    assert report.refused == (
        ("0", "has no running statistics"),
        ("1", "has no running statistics"),
    )
    assert report.layers == ()


def test_layers_that_share_a_buffer_are_refused() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    net[1].running_mean = net[0].running_mean
    report = recalibrate(net, conv_input())
    assert report.refused == (
        ("0", "shares its running statistics with 1"),
        ("1", "shares its running statistics with 0"),
    )
    assert [layer.path for layer in report.layers] == ["2"]


def test_a_single_value_has_no_variance() -> None:
    net = conv_net()[5:]
    before = Fingerprint(net)
    report = recalibrate(net, torch.ones(1, 216))
    assert report.refused == (
        ("6", "received at most one value per channel, which has no variance"),
    )
    assert not Fingerprint(net).differences(before)


def test_meta_layers_are_refused() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4, device="meta"))
    report = recalibrate(net, torch.randn(8, 4), forward=lambda model, batch: model[0](batch))
    assert report.refused == (("1", "is on the meta device"),)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_layers_are_refused_and_the_others_recalibrated() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), torch.jit.script(nn.BatchNorm2d(3)))
    before = values(net[1])
    report = recalibrate(net, conv_input())
    assert [layer.path for layer in report.layers] == ["0"]
    assert report.refused[0][0] == "1"
    assert "TorchScript" in report.refused[0][1]
    assert not changed(net[1], before)


def test_lazy_models_raise_before_anything_runs() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.LazyConv2d(4, 1))
    with pytest.raises(StateError, match="1 is a LazyConv2d"):
        recalibrate(net, conv_input())
    assert type(net[1]) is nn.LazyConv2d


def test_a_model_without_norms_gives_an_empty_report() -> None:
    report = recalibrate(nn.Linear(3, 2), torch.zeros(2, 3))
    assert (report.layers, report.unreached, report.held, report.refused) == ((), (), (), ())
    report.undo()


def test_a_selector_that_matches_nothing_raises() -> None:
    with pytest.raises(SelectorError):
        recalibrate(conv_net(), batches(), layers="nowhere")


def test_an_unknown_method_raises() -> None:
    with pytest.raises(CalibrationError, match="precise") as caught:
        recalibrate(conv_net(), batches(), method="precise")  # type: ignore[arg-type]
    assert caught.value.help == 'method="pooled" or method="sequential"'


# ------------------------------------------------------------------ batches of every form


class Stream(IterableDataset):
    """No length."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from batches()


def forms() -> dict[str, object]:
    joined = torch.cat(batches())
    return {
        "list of tensors": batches(),
        "list of pairs": [(x, torch.zeros(len(x))) for x in batches()],
        "list of lists": [[x, torch.zeros(len(x))] for x in batches()],
        "list of mappings": [{"input": x} for x in batches()],
        "generator": (x for x in batches()),
        "iterable dataset": Stream(),
        "loader over it": DataLoader(Stream(), batch_size=None),
        "loader, ragged": DataLoader(TensorDataset(joined, torch.arange(len(joined))), 4),
    }


@pytest.mark.parametrize("form", forms())
def test_batches_in_every_form(form: str) -> None:
    net = conv_net()
    with recording(net) as received:
        report = recalibrate(net, forms()[form])
    assert_exact(received)
    assert report.samples == 11
    assert report.batches == 3
    assert len(received[net[1]]) == 3, "read once"


def test_a_forward_of_the_users_own() -> None:
    net = conv_net()
    with recording(net) as received:
        recalibrate(
            net,
            [{"id": 1, "views": x} for x in batches()],
            forward=lambda model, batch: model(batch["views"]) + model(-batch["views"]),
        )
    assert len(received[net[1]]) == 6
    assert_exact(received)


# ------------------------------------------------------------------ as found


def test_dropout_is_off_and_everything_but_the_statistics_is_as_found() -> None:
    net = nn.Sequential(conv_net(), nn.Dropout(0.5), make("1d-flat").__class__(5, momentum=None))
    net.train()
    net[0][1].eval()
    net(conv_input()).sum().backward()
    x = batches()
    buffers = dict(net.named_buffers())
    before = Fingerprint(net, versions=False)
    report = recalibrate(net, x)
    moved = {name.split(" ")[0] for name in Fingerprint(net, versions=False).differences(before)}
    assert moved == {
        f"{path}._buffers[{name}]" for path in ("0.1", "0.3.1", "0.6", "2") for name in STATISTICS
    }
    assert all(tensor is buffers[name] for name, tensor in net.named_buffers())
    assert len(report.layers) == 4


def test_dropout_changes_nothing_of_what_layers_receive() -> None:
    nets = [nn.Sequential(nn.Dropout(p), *conv_net()).train() for p in (0.0, 0.9)]
    for net in nets:
        recalibrate(net, batches())
    for a, b in zip(nets[0].buffers(), nets[1].buffers(), strict=True):
        assert torch.equal(a, b)


def test_undo_restores_every_bit() -> None:
    net = conv_net()
    with torch.no_grad():
        net[1].running_var[0] = float("nan")
    before = Fingerprint(net, versions=False)
    report = recalibrate(net, batches())
    assert Fingerprint(net, versions=False).differences(before)
    report.undo()
    assert not Fingerprint(net, versions=False).differences(before)
    report.undo()
    assert not Fingerprint(net, versions=False).differences(before)


def test_undo_finds_the_buffers_where_they_are_now() -> None:
    net, before = conv_net(), conv_net()
    report = recalibrate(net, batches())
    net.double()
    report.undo()
    for a, b in zip(net.buffers(), before.buffers(), strict=True):
        assert torch.equal(a, b.to(a))


@pytest.mark.parametrize("other", [None, torch.zeros(7)], ids=["none", "another shape"])
def test_undo_of_a_layer_that_lost_its_statistics_raises_and_changes_nothing(
    other: Tensor | None,
) -> None:
    net = conv_net()
    report = recalibrate(net, batches())
    net[6].running_mean = other
    before = Fingerprint(net)
    with pytest.raises(StateError, match="BatchNorm1d no longer has the running_mean"):
        report.undo()
    assert not Fingerprint(net).differences(before)


def test_statistics_made_in_inference_mode_are_recalibrated() -> None:
    with torch.inference_mode():
        net = conv_net()
    with recording(net) as received:
        recalibrate(net, batches())
    assert_exact(received)


def test_within_inference_mode() -> None:
    net = conv_net()
    with torch.inference_mode(), recording(net) as received:
        recalibrate(net, batches())
    assert_exact(received)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net.train()(conv_input()).sum().backward()


def test_compiled_models_and_models_in_wrappers() -> None:
    net, plain = conv_net(), conv_net()
    compiled = nn.DataParallel(torch.compile(net, backend="eager"))
    with torch.no_grad():
        compiled.eval()(conv_input())
    report = recalibrate(compiled, batches())
    assert [layer.path for layer in report.layers] == ["1", "3.1", "6"]
    recalibrate(plain, batches())
    for a, b in zip(net.buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b)
    torch._dynamo.reset()


@pytest.mark.parametrize("method", ["pooled", "sequential"])
def test_a_spectral_norm_is_not_moved_by_being_looked_at(method: str) -> None:
    def made() -> nn.Module:
        net = conv_net()
        nn.utils.parametrizations.spectral_norm(net[0])
        with torch.no_grad():  # u lags, as after a step of the optimizer
            net[0].parametrizations.weight.original.add_(conv_input(4)[:, :, :3, :3])
        return net

    training, evaluating = made().train(), made().eval()
    evaluating.load_state_dict(training.state_dict())
    recalibrate(training, batches(), method=method)  # type: ignore[arg-type]
    recalibrate(evaluating, batches(), method=method)  # type: ignore[arg-type]
    for a, b in zip(training.buffers(), evaluating.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", ["pooled", "sequential"])
def test_an_empty_batch_does_not_make_a_layer_shared(method: str) -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    data = iter([torch.randn(8, 4), torch.randn(0, 4), torch.randn(3, 4)])
    assert recalibrate(net, data, method=method).shared == ()  # type: ignore[arg-type]


# ------------------------------------------------------------------ what newcomers do


def test_arguments_the_wrong_way_round_and_of_the_wrong_kind() -> None:
    with pytest.raises(ModelError, match="a list is no torch"):
        recalibrate(batches(), conv_net())  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="tolerance='1%'"):
        recalibrate(conv_net(), batches(), tolerance="1%")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="no group 'slef'"):
        recalibrate(conv_net(), batches(), group="slef")  # type: ignore[arg-type]
    with pytest.raises(BatchError, match="call it: batches"):
        recalibrate(conv_net(), batches)
    with pytest.raises(BatchError, match=r"NumPy array.*\n.*torch.from_numpy"):
        recalibrate(conv_net(), [x.numpy() for x in batches()])


def test_the_report_says_what_a_tolerance_would_take_and_that_one_batch_tells_nothing() -> None:
    report = recalibrate(conv_net(), batches(), tolerance=0.001)
    error = report.standard_error
    assert error is not None
    needed = math.ceil(3 * (error / 0.001) ** 2)
    assert f"0.0010 would take about {needed} batches" in str(report)
    assert "would take" not in str(recalibrate(conv_net(), batches()))
    assert "one batch alone" in str(recalibrate(conv_net(), batches()[0]))


@pytest.mark.parametrize("counted", [-(2**62), 2**62])
def test_a_count_that_is_unwritten_memory_begins_anew(counted: int) -> None:
    net = nn.Sequential(nn.BatchNorm1d(4))
    net[0].num_batches_tracked.fill_(counted)
    recalibrate(net, [torch.randn(8, 4), torch.randn(8, 4)])
    assert int(net[0].num_batches_tracked) == 2
