"""The page says what was measured: noise is grey, faults stand out, nothing is made up."""

from __future__ import annotations

import ast
import json
import re
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import stillnorm as sn
from diagnosis.nets import batches, conv_net, data, estimated
from stillnorm import check, freeze
from stillnorm.diagnosis.finding import Action, Fix
from stillnorm.diagnosis.fixing.fix_calls import call_of
from stillnorm.diagnosis.writing.layer_view import NOISE, in_standard_errors
from stillnorm.diagnosis.writing.normalized_values import BINS, WHOLE
from stillnorm.diagnosis.writing.page import Page, page_of
from stillnorm.norms import find_norms


def page(report) -> Page:
    return page_of(report, report._evidence)


def shifted(by: float = 2.0) -> nn.Sequential:
    torch.manual_seed(0)
    net = estimated(conv_net(), data(256, seed=7))
    net[4].running_mean += by
    return net


class Shared(nn.Module):
    """One norm, called on a small input and on a large one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.free = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.free(self.norm(x) + self.norm(5 * x + 3))


# -------------------------------------------------------------------------------- standard errors


@settings(max_examples=40, deadline=None)
@given(n=st.integers(16, 300), channels=st.integers(8, 200), seed=st.integers(0, 99))
def test_noise_is_about_one_standard_error_whatever_its_size(n, channels, seed):
    g = torch.Generator().manual_seed(seed)
    d = torch.randn(n, channels, generator=g) * torch.rand(1, generator=g)
    assert 0.2 < in_standard_errors(d) < NOISE


def test_a_difference_grows_with_the_root_of_the_samples():
    g = torch.Generator().manual_seed(0)
    d = 0.5 + torch.randn(4000, 8, generator=g)
    few, many = in_standard_errors(d[:40]), in_standard_errors(d)
    assert few == pytest.approx(0.5 * 40**0.5, rel=0.3)
    assert many == pytest.approx(0.5 * 4000**0.5, rel=0.1)


def test_one_sample_tells_no_error_and_constants_tell_all():
    assert in_standard_errors(torch.ones(1, 3)) is None
    assert in_standard_errors(torch.zeros(4, 3)) == 0
    assert in_standard_errors(torch.ones(4, 3)) == float("inf")


# -------------------------------------------------------------------------------- the strip


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_network_is_grey(seed):
    torch.manual_seed(seed)
    told = page(check(estimated(conv_net(), data(256, seed=70 + seed)), batches(seed=seed)))
    assert all(layer.off["batch"].errors < NOISE for layer in told.layers)
    assert told.first is None


def test_the_layer_that_was_shifted_stands_out_alone():
    told = page(check(shifted(), batches()))
    by_path = {layer.path: layer for layer in told.layers}
    assert by_path["1"].off["batch"].errors < NOISE
    assert by_path["4"].off["batch"].errors > 10
    assert by_path["4"].off["recalibrated"].errors < NOISE
    assert told.layers[told.first].path == "4"
    codes = [told.findings[i].diagnostic.code for i in by_path["4"].findings]
    assert "SN105" in codes


def test_layers_stand_in_the_order_of_the_forward():
    net = nn.ModuleDict({"last": nn.BatchNorm2d(3), "never": nn.BatchNorm2d(3)})
    net["first"] = nn.BatchNorm2d(3)
    net.forward = lambda x: net["last"](net["first"](x))
    told = page(check(net, batches()))
    assert [layer.path for layer in told.layers] == ["first", "last", "never"]
    assert told.layers[2].why == "never called"
    assert told.layers[2].off == {}


def test_held_layers_are_named_as_such():
    net = estimated(conv_net())
    freeze(net, "1")
    told = page(check(net, batches()))
    assert [layer.held for layer in told.layers] == ["stillnorm", ""]


def test_a_shared_layer_is_as_far_off_as_its_worst_call():
    net = Shared()
    sn.recalibrate(net, batches())
    told = page(check(net, batches()))
    shared = told.layers[0]
    assert len(shared.calls) == 2
    assert shared.off["batch"].errors == max(call.off.errors for call in shared.calls) > 30
    assert [call.site.partition(":")[0] for call in shared.calls] == ["test_page.py"] * 2
    assert len(shared.channels.received) == 2
    means = [sum(call.mean) / 3 for call in shared.channels.received]
    assert means == pytest.approx([call.mean for call in shared.calls], rel=1e-3)
    assert told.first == 0


# -------------------------------------------------------------------------------- one layer


def test_channels_are_those_of_the_input():
    net, inputs = estimated(conv_net()), batches()
    layer = page(check(net, inputs)).layers[0]
    with torch.no_grad():
        x = net[0](torch.cat(inputs))
    order = torch.tensor(layer.channels.index)
    (seen,) = layer.channels.received
    close = {"rtol": 2e-3, "atol": 1e-6}
    assert sorted(layer.channels.index) == list(range(8))
    torch.testing.assert_close(torch.tensor(seen.mean), x.mean((0, 2, 3))[order], **close)
    torch.testing.assert_close(
        torch.tensor(seen.var), x.var((0, 2, 3), correction=0)[order], **close
    )
    per_sample = x.mean((2, 3))[:, order]
    torch.testing.assert_close(
        torch.tensor(seen.mean_error), per_sample.std(0) / len(x) ** 0.5, rtol=1e-2, atol=1e-6
    )
    torch.testing.assert_close(
        torch.tensor(layer.channels.mean), net[1].running_mean[order], **close
    )


def test_many_channels_are_thinned_and_the_worst_is_kept():
    net = nn.Sequential(nn.BatchNorm1d(1000))
    with torch.no_grad():
        net[0].running_mean[617] = 5
    channels = page(check(net, list(torch.randn(64, 1000).split(16)))).layers[0].channels
    assert channels.total == 1000
    assert len(channels.index) == len(set(channels.index)) == 256
    assert channels.index[0] == 617


def test_spreads_are_those_of_what_is_normalised():
    net, inputs = shifted(), batches()
    layer = page(check(net, inputs)).layers[1]
    norm = net[4]
    with torch.no_grad():
        x = net[:4].eval()(inputs[0])
        by_running = (x - norm.running_mean[:, None, None]) / (
            norm.running_var[:, None, None] + norm.eps
        ).sqrt()
        x = net[3](net[2](nn.BatchNorm2d.forward(net[1].train(), net[0](inputs[0]))))
        by_batch = nn.functional.batch_norm(x, None, None, training=True, eps=norm.eps)
    for values, flow, used in ((by_batch, "batch", "batch"), (by_running, "eval", "running")):
        spread = layer.values[flow]
        expected = WHOLE * torch.histc(values, BINS, -6, 6) / values.numel()
        assert spread.used == used
        assert len(spread.counts) == BINS
        assert sum(spread.counts) + spread.outside == pytest.approx(WHOLE, abs=BINS / 2)
        torch.testing.assert_close(
            torch.tensor(spread.counts).float(), expected, atol=40.0, rtol=0.02
        )


def test_making_the_page_leaves_the_model_alone():
    net = shifted().train()
    net[1].eval()
    report = check(net, batches())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    versions = [tensor._version for tensor in net.state_dict().values()]
    modes, draw = [m.training for m in net.modules()], torch.get_rng_state()
    report.to_html()
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [tensor._version for tensor in net.state_dict().values()] == versions
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), draw)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


# ------------------------------------------------------------------------ a model that moved on


def without_values(told: Page) -> list[object]:
    return [(layer.off, layer.channels, layer.calls) for layer in told.layers]


def test_after_a_fix_the_page_still_says_what_was_found():
    untouched = page(check(shifted(), batches()))
    report = check(shifted(), batches())
    report.fix(unsafe=True)
    told = page(report)
    assert without_values(told) == without_values(untouched)
    assert told.no_values == "the model has changed since it was checked"
    assert all(layer.values == {} for layer in told.layers)
    assert told.no_values in report.to_html()


def test_distances_are_of_the_statistics_as_they_were_found():
    net = shifted()
    evidence = check(net, batches())._evidence
    before = evidence.distance(evidence.layers[1], "batch").mean
    evidence._distances.clear()
    net[4].running_mean += 5
    assert evidence.distance(evidence.layers[1], "batch").mean == before


def test_other_weights_are_another_model():
    net = shifted()
    report = check(net, batches())
    with torch.no_grad():
        net[0].weight *= 2
    assert page(report).no_values == "the model has changed since it was checked"


def test_a_forward_that_fails_by_now_is_told():
    net = shifted()
    report = check(net, batches())
    net[2] = nn.Linear(3, 3)
    assert "the forward raised" in page(report).no_values
    assert "the forward raised" in report.to_html()


# -------------------------------------------------------------------------------- fixes


def test_every_action_has_a_line_of_python():
    layers = find_norms(conv_net())
    for action in get_args(Action):
        for applicability in ("safe", "unsafe"):
            line = call_of(Fix("", applicability, action, ("1",), "gn"), layers)
            for part in ast.walk(ast.parse(line)):
                if isinstance(part, ast.Attribute) and ast.unparse(part).startswith("sn."):
                    eval(ast.unparse(part), {"sn": sn})


@pytest.mark.parametrize("paths", [("1",), ("1", "4")])
def test_the_line_does_what_the_fix_does(paths):
    net = estimated(conv_net())
    for path in paths:
        net[int(path)].running_mean += 2
    report = check(net, batches())
    (fix,) = [f.fix for f in report.findings if f.code == "SN105"]
    line = call_of(fix, find_norms(net))
    everything = len(paths) == 2
    assert line == f"sn.recalibrate(model, batches{'' if everything else ', ' + repr(paths[0])})"
    exec(line, {"sn": sn, "model": net, "batches": batches()})
    assert "SN105" not in [finding.code for finding in check(net, batches()).findings]


def test_what_takes_more_than_one_call_is_left_to_the_report():
    net = estimated(conv_net())
    freeze(net, "1")
    layers = find_norms(net)
    held = Fix("", "unsafe", "recalibrate", ("1",))
    assert call_of(held, layers) == "report.fix(unsafe=True)"
    assert call_of(Fix("", "safe", "momentum", ("4",)), layers) == "report.fix()"
    assert call_of(Fix("", "unsafe", "freeze", ("gone",)), layers) == "report.fix(unsafe=True)"


def test_a_freeze_keeps_what_the_affine_parameters_do():
    net = conv_net()
    fix = Fix("", "safe", "freeze", ("1",))
    assert call_of(fix, find_norms(net)) == "sn.freeze(model, '1', affine=\"trains\")"
    net[1].requires_grad_(False)
    assert call_of(fix, find_norms(net)) == "sn.freeze(model, '1')"


# -------------------------------------------------------------------------------- the page itself


def blob(source: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', source)
    return json.loads(text)


def test_the_page_needs_nothing_else():
    source = check(shifted(), batches()).to_html()
    script = source.replace("http://www.w3.org/2000/svg", "")  # the name of SVG, not an address
    assert not re.search(r"https?:|url\(|@import|<link|<img| src=|fetch\(|XMLHttp", script)
    assert "default-src 'none'" in source


def test_the_same_report_gives_the_same_page():
    report = check(shifted(), batches())
    assert report.to_html() == report.to_html()


def test_scores_stand_first_in_the_users_unit():
    report = check(shifted(), batches(), score=lambda output, batch: 0.25)
    source = report.to_html()
    assert source.count("25.0\N{NO-BREAK SPACE}%") + source.count("25.0 %") >= 3
    assert "your score" not in check(shifted(), batches()).to_html()


def test_what_was_not_checked_is_named_with_its_reason():
    told = dict(page(check(shifted())).unchecked)
    assert any("SN105 mismatched-statistics" in rules for rules in told.values())
    source = check(shifted()).to_html()
    assert "Not checked, and why" in source
    assert "SN105 mismatched-statistics" in source


def test_without_batches_layers_are_shown_unmeasured():
    report = check(shifted())
    assert {layer.why for layer in page(report).layers} == {"needs batches"}
    assert blob(report.to_html())["no_values"] == "needs batches"


def test_a_model_without_norms_has_a_page_without_layers():
    source = check(nn.Linear(3, 3), [torch.randn(4, 3)]).to_html()
    assert 'id="strip"' not in source


def test_nothing_in_the_data_ends_the_script():
    net = estimated(conv_net())
    net.add_module("</script><b>", nn.BatchNorm1d(4))
    source = check(net, batches()).to_html()
    assert "</script><b>" not in source
    assert blob(source)["layers"][2]["path"] == "</script><b>"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_broken_statistics_have_a_page(value):
    net = estimated(conv_net())
    net[4].running_var[0] = value
    data = blob(check(net, batches()).to_html())
    assert len(data["layers"]) == 2


@pytest.mark.parametrize(
    ("net", "inputs"),
    [
        (nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)), data(16)),
        (nn.Sequential(nn.InstanceNorm2d(3)), data(16)),
        (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), data(16)),
        (nn.Sequential(nn.BatchNorm2d(3, affine=False)).half(), data(16).half()),
        (nn.Sequential(nn.BatchNorm1d(4)), torch.randn(1, 4, 6)),
        (nn.Sequential(nn.BatchNorm1d(4)), torch.randn(16, 4)),
        (nn.BatchNorm1d(4), torch.randn(16, 4)),
        (nn.Sequential(nn.BatchNorm2d(3, device="meta")), None),
        (nn.Sequential(nn.LazyBatchNorm2d()), None),
    ],
)
def test_every_kind_of_layer_has_a_page(net, inputs):
    (layer,) = blob(check(net, inputs).to_html())["layers"]
    assert layer["kind"] == type(net[0] if isinstance(net, nn.Sequential) else net).__name__
    assert layer["off"] or layer["why"]
