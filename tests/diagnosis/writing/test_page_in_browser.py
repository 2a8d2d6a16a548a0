"""The page promises: a click opens a layer, keys and filter work, nothing goes wrong or out."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from diagnosis.nets import batches, conv_net, data, estimated
from stillnorm import check
from stillnorm.diagnosis.writing import page as module
from stillnorm.reports import html
from support.browser import CHROMIUM, visit

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")


def sick() -> nn.Module:
    torch.manual_seed(0)
    net = estimated(conv_net(), data(256, seed=7))
    net[4].running_mean += 2
    net.add_module("never", nn.BatchNorm2d(4))
    net.forward = lambda x: nn.Sequential(*list(net)[:-1])(x)
    return net


@pytest.fixture(scope="module")
def page() -> str:
    report = check(sick(), batches(), score=lambda output, batch: float(output.std()))
    assert report.findings
    return report.to_html()


@pytest.fixture(scope="module")
def long_page() -> str:
    """Twenty layers of 256 channels, and each of them 25 times over, drawn as 500 layers are."""
    net = nn.Sequential(*(nn.BatchNorm1d(256) for _ in range(20)))
    net[10].running_mean += 3
    report = check(net, list(torch.randn(24, 256).split(8)), select="SN003")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ALL_CHANNELS", module.ALL_CHANNELS * 20 // 500)
        page = module.page_of(report, report._evidence)
    layers = tuple(
        replace(layer, path=f"{i}.{layer.path}") for i in range(25) for layer in page.layers
    )
    return html.write_check(*replace(page, layers=layers).parts)


USE = """
  const cells = all(".cell"), panel = one("#layer");
  const names = () => panel.querySelector("h3")?.textContent ?? "";
  seen.cells = cells.length;
  seen.first = all(".cell .top").findIndex((top) => top.textContent);
  seen.atStart = [panel.hidden, names()];
  cells[0].click();
  seen.clicked = [names(), cells[0].getAttribute("aria-expanded"), panel.hidden];
  seen.drawn = panel.querySelectorAll("svg.scatter .dot").length;
  seen.outlines = panel.querySelectorAll("svg.spread .outline").length;
  cells[0].click();
  seen.again = panel.hidden;

  cells[0].focus();
  key("ArrowRight");
  seen.moved = cells.indexOf(document.activeElement);
  seen.stillClosed = panel.hidden;
  document.activeElement.click(); // what Enter does on a button
  seen.entered = names();
  key("ArrowLeft");
  seen.followed = names();
  key("End");
  seen.end = cells.indexOf(document.activeElement);
  key("Home");
  key("ArrowLeft");
  seen.home = cells.indexOf(document.activeElement);
  key("Escape");
  seen.escaped = [panel.hidden, cells.indexOf(document.activeElement)];
  seen.stops = cells.filter((cell) => cell.tabIndex === 0).length;
  seen.labels = cells.map((cell) => cell.getAttribute("aria-label"));

  const type = (text) => {
    one("#filter").value = text;
    one("#filter").dispatchEvent(new Event("input"));
    return all(".cell:not([hidden])").map((cell) => cells.indexOf(cell));
  };
  seen.byPath = type("NEV");
  seen.stopAfterFilter = cells.findIndex((cell) => cell.tabIndex === 0);
  seen.count = one("#count").textContent;
  seen.byFinding = type("sn105");
  seen.byBoth = type("batchnorm never");
  seen.byNothing = type("no such layer");
  seen.cleared = type("").length;

  one("#list").open = true;
  await new Promise((done) => setTimeout(done, 20));
  seen.rows = all("#list tbody tr").length;
  all("#list tbody button")[1].click();
  seen.fromTable = names();
  one('#flow [value="recalibrated"]').click();
  seen.recalibrated = cells.map((cell) => cell.className.match(/l\\d|none/)[0]);
"""


@pytest.fixture(scope="module", params=[1280, 390])
def seen(request, page, tmp_path_factory):
    found = visit(page, USE, tmp_path_factory.mktemp("page"), request.param)
    assert found["width"] == request.param
    return found


def test_nothing_goes_wrong_at_either_width(seen):
    assert seen["wrong"] == []
    assert seen["fetched"] == []
    assert seen["overflow"] <= 0


def test_the_strip_has_every_layer_and_marks_the_first_that_diverges(seen):
    assert seen["cells"] == 3
    assert seen["first"] == 1
    assert "first to diverge" in seen["labels"][1]
    assert "SN105" in seen["labels"][1]
    assert "noise" in seen["labels"][0]
    assert "never called" in seen["labels"][2]


def test_the_telling_layer_is_open_at_the_start(seen):
    assert seen["atStart"] == [False, "4"]


def test_a_click_opens_a_layer_and_another_closes_it(seen):
    assert seen["clicked"] == ["1", "true", False]
    assert seen["drawn"] == 2 * 8  # mean and variance of each channel
    assert seen["outlines"] == 2
    assert seen["again"] is True


def test_keys_move_and_an_open_layer_follows(seen):
    assert seen["moved"] == 1
    assert seen["stillClosed"] is True
    assert (seen["entered"], seen["followed"]) == ("4", "1")
    assert (seen["end"], seen["home"]) == (2, 0)
    assert seen["escaped"] == [True, 0]
    assert seen["stops"] == 1


def test_the_filter_knows_paths_kinds_and_findings(seen):
    assert seen["byPath"] == [2]
    assert seen["stopAfterFilter"] == 2  # what is hidden cannot be tabbed to
    assert seen["count"] == "1 of 3"
    assert seen["byFinding"] == [1]
    assert seen["byBoth"] == [2]
    assert seen["byNothing"] == []
    assert seen["cleared"] == 3


def test_the_table_opens_layers_too(seen):
    assert seen["rows"] == 3
    assert seen["fromTable"] == "4"


def test_recalibrated_statistics_are_grey(seen):
    assert seen["recalibrated"] == ["l0", "l0", "none"]


@pytest.mark.parametrize("width", [1280, 390])
def test_five_hundred_layers_work(long_page, tmp_path, width):
    assert len(long_page) < 3_000_000
    seen = visit(
        long_page,
        """
        const cells = all(".cell");
        seen.cells = cells.length;
        seen.height = one("#strip").offsetHeight;
        seen.open = one("#layer h3").textContent;
        cells[499].click();
        seen.last = one("#layer h3").textContent;
        seen.thinned = one("#layer .note").textContent;
        one("#filter").value = "diverges";
        one("#filter").dispatchEvent(new Event("input"));
        seen.filtered = all(".cell:not([hidden])").map((cell) => cells.indexOf(cell));
        """,
        tmp_path,
        width,
    )
    assert seen["wrong"] == seen["fetched"] == []
    assert seen["overflow"] <= 0
    assert seen["cells"] == 500
    assert seen["height"] < 1300
    assert (seen["open"], seen["last"]) == ("0.10", "24.19")
    assert "of 256 channels, thinned evenly" in seen["thinned"]
    assert 10 in seen["filtered"]


def test_names_that_are_markup_stay_names(tmp_path):
    net = estimated(conv_net())
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    net.add_module(evil, nn.BatchNorm1d(4))
    page = check(net, batches()).to_html()
    seen = visit(
        page,
        """
        window.alert = () => { seen.alerted = true; };
        for (const i of [0, 2]) all(".cell")[i].click();
        seen.name = one("#layer h3").textContent;
        seen.images = all("img").length;
        """,
        tmp_path,
    )
    assert seen["wrong"] == []
    assert seen["name"] == evil
    assert seen["images"] == 0
    assert "alerted" not in seen


def test_a_finding_leads_to_its_layer_and_back(page, tmp_path):
    seen = visit(
        page,
        """
        all(".cell")[0].click();
        one("[data-open]").click();
        seen.opened = one("#layer h3").textContent;
        for (const link of all("#layer a.chip")) seen.target = !!one(link.getAttribute("href"));
        seen.copies = all("dd button").map((button) => button.getAttribute("aria-label"));
        """,
        tmp_path,
    )
    assert seen["wrong"] == []
    assert seen["opened"] == "4"
    assert seen["target"] is True
    assert "copy report.fix(unsafe=True)" in seen["copies"]
    assert any(label.startswith("copy sn.recalibrate(model, batches") for label in seen["copies"])
