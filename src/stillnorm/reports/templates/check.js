// The layers: a strip in the order of the forward, and one of them open below it.
const { layers, first, findings, noise, reach, no_values: noValues } = JSON.parse(
  document.getElementById("data").textContent);
const strip = document.getElementById("strip"), panel = document.getElementById("layer");
const MARKS = { error: "■", warning: "▲", info: "○" };
let flow = "batch", opened = -1;
const cells = [];

const nameOf = (layer) => layer.path || "(root)";
const errorsOf = (layer, which = flow) => {
  const x = value(layer.off[which]?.errors ?? NaN);
  return x === null ? NaN : x;
};
const levelOf = (errors) => [noise, 10, 30].filter((limit) => errors >= limit).length;
const severityOf = (layer) =>
  ["error", "warning", "info"].find((s) => layer.findings.some((i) => findings[i].severity === s));
const MEANINGS = {
  batch: "Each layer by itself: its input is that of training, where no error spreads.",
  eval: "In eval, where the errors of earlier layers are in a layer's input.",
  recalibrated: "In eval, after recalibrating on these batches.",
};
const told = (layer, which = flow) => {
  const x = errorsOf(layer, which);
  return Number.isNaN(x) ? "-" : x < 10 ? number(x) : x.toFixed(0);
};
const calls = (layer) => layer.findings.map((i) => `${findings[i].code} ${findings[i].slug}`);

function inWords(layer) {
  const errors = errorsOf(layer);
  const missing = layer.why || (flow === "recalibrated" ? "not recalibrated" : "not measured");
  return [
    `${nameOf(layer)}  ${layer.kind}(${layer.features})`,
    Number.isNaN(errors) ? missing : `${told(layer)} standard errors${errors < noise ? ", noise" : ""}`,
    layers[first] === layer ? "first to diverge" : "",
    layer.held && "held",
    ...calls(layer),
  ].filter(Boolean).join(" · ");
}

// ---------------------------------------------------------------------------------- the strip

function paint(cell, layer) {
  const errors = errorsOf(layer), none = Number.isNaN(errors);
  const height = errors < noise ? (30 * errors) / noise : 30 + (70 * Math.log(errors / noise)) / Math.log(100 / noise);
  cell.className = `cell ${none ? "none" : "l" + levelOf(errors)}${layer.held ? " held" : ""}`;
  cell.style.setProperty("--height", `${Math.max(6, Math.min(height, 100)).toFixed(0)}%`);
  cell.setAttribute("aria-label", inWords(layer));
}

function makeStrip() {
  strip.style.setProperty("--n", layers.length);
  strip.className = layers.length <= 12 ? "few" : layers.length > 120 ? "many" : "";
  layers.forEach((layer, i) => {
    const severity = severityOf(layer);
    const cell = element("button", { type: "button", tabindex: i ? -1 : 0, "aria-expanded": "false", "aria-controls": "layer" },
      element("span", { class: "top" }, i === first ? "▼" : ""),
      element("span", { class: "well" }, element("span", { class: "fill" })),
      element("span", { class: `sign ${severity ?? ""}` }, severity ? MARKS[severity] : ""));
    if (layers.length <= 12) cell.append(element("span", { class: "label" }, nameOf(layer).split(".").slice(-2).join(".")));
    cell.addEventListener("click", () => { opened === i ? close() : open(i, true); });
    for (const seen of ["focus", "pointerenter"]) cell.addEventListener(seen, () => read(i));
    paint(cell, layer);
    cells.push(cell);
  });
  strip.append(...cells);
}

const read = (i) => (document.getElementById("readout").textContent = i < 0 ? "\u00a0" : inWords(layers[i]));
const shown = () => layers.map((_, i) => i).filter((i) => !cells[i].hidden);

function focusOn(i) {
  cells.forEach((cell, j) => (cell.tabIndex = i === j ? 0 : -1));
  cells[i].focus();
  if (opened >= 0) open(i);
}

strip.addEventListener("keydown", (event) => {
  const here = cells.indexOf(document.activeElement), seen = shown(), at = seen.indexOf(here);
  if (at < 0) return;
  const row = seen.filter((i) => cells[i].offsetTop === cells[here].offsetTop).length;
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + row, ArrowUp: at - row, Home: 0, End: seen.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  if (to >= 0 && to < seen.length) focusOn(seen[to]);
});

// ---------------------------------------------------------------------------------- filter, flow, list

function filter(text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  layers.forEach((layer, i) => {
    const state = [severityOf(layer) ?? "", layer.held && `held ${layer.held}`, errorsOf(layer) >= noise ? "diverges" : "", layer.why];
    const text = [nameOf(layer), layer.kind, ...calls(layer), ...state].join(" ").toLowerCase();
    cells[i].hidden = !words.every((word) => text.includes(word));
  });
  const seen = shown();
  document.getElementById("count").textContent =
    seen.length === layers.length ? "" : `${seen.length} of ${layers.length}`;
  if (seen.length && !seen.some((i) => cells[i].tabIndex === 0)) {
    cells.forEach((cell, i) => (cell.tabIndex = i === seen[0] ? 0 : -1));
  }
  list();
}

function list() {
  const box = document.querySelector("#list .scroll");
  box.replaceChildren();
  if (!document.getElementById("list").open) return;
  const rows = shown().map((i) => {
    const layer = layers[i], off = layer.off[flow];
    const name = element("button", { type: "button", class: "chip" }, nameOf(layer));
    name.addEventListener("click", () => open(i, true));
    return [name, `${layer.kind}(${layer.features})`, off ? number(off.mean) : "-", off ? number(off.ratio) : "-",
      told(layer), [layer.why, layer.held && "held", ...calls(layer)].filter(Boolean).join(", ")];
  });
  box.append(...table(["path", "kind", "mean off, sigma", "variance x", "standard errors", ""], rows, "llrrrl").childNodes);
}

document.getElementById("filter").addEventListener("input", (event) => filter(event.target.value));
document.getElementById("list").addEventListener("toggle", list);
const choice = document.getElementById("flow");
choice.hidden = !layers.some((layer) => layer.off.eval);
for (const input of choice.querySelectorAll("input")) {
  input.parentElement.hidden = !layers.some((layer) => layer.off[input.value]);
}
const explain = () => (document.getElementById("meaning").textContent = choice.hidden ? "" : MEANINGS[flow]);
choice.addEventListener("change", (event) => {
  flow = event.target.value;
  explain();
  layers.forEach((layer, i) => paint(cells[i], layer));
  if (opened >= 0) open(opened);
  list();
});

// ---------------------------------------------------------------------------------- one layer

function open(i, look = false) {
  if (opened >= 0) cells[opened].setAttribute("aria-expanded", "false");
  opened = i;
  cells[i].setAttribute("aria-expanded", "true");
  const layer = layers[i];
  panel.hidden = false;
  panel.setAttribute("aria-label", `Layer ${nameOf(layer)}`);
  panel.replaceChildren(...head(i, layer), ...statistics(layer), ...values(layer), ...callSites(layer));
  read(i);
  const top = panel.getBoundingClientRect().top;
  if (look && (top > 0.7 * innerHeight || top < 0)) panel.scrollIntoView();
}

function close() {
  if (opened < 0) return;
  const cell = cells[opened];
  cell.setAttribute("aria-expanded", "false");
  opened = -1;
  panel.hidden = true;
  panel.replaceChildren();
  if (!cell.hidden) cell.focus();
}

addEventListener("keydown", (event) => {
  if (event.key === "Escape" && event.target.id !== "filter") close();
});

function head(i, layer) {
  const button = (text, label, act) => {
    const made = element("button", { type: "button", "aria-label": label }, text);
    made.addEventListener("click", act);
    return made;
  };
  const step = (by) => () => {
    const seen = shown(), to = seen[seen.indexOf(i) + by];
    if (to !== undefined) open(to);
    panel.querySelector(by < 0 ? ".steps button" : ".steps button + button").focus();
  };
  const facts = element("p", { class: "facts" }, `${layer.kind}(${layer.features})`);
  if (layer.held) facts.append(" · held by ", layer.held);
  for (const [label, text] of layer.facts) facts.append(` · ${label} ${text}`);
  const links = element("p", { class: "chips" }, ...layer.findings.map((at) => {
    const { code, slug, severity } = findings[at];
    const link = element("a", { href: `#finding-${at}`, class: "chip" }, element("span", { class: severity }, MARKS[severity]), ` ${code} ${slug}`);
    link.addEventListener("click", () => {
      const folded = document.getElementById(`finding-${at}`).closest("details");
      if (folded) folded.open = true;
    });
    return link;
  }));
  return [
    element("header", {}, element("h3", {}, nameOf(layer)),
      element("div", { class: "steps" }, button("←", "previous layer", step(-1)), button("→", "next layer", step(1)), button("close", "close the layer", close))),
    facts,
    ...(layer.findings.length ? [links] : []),
    ...(layer.why ? [element("p", { class: "dim" }, `Not measured: ${layer.why}.`)] : []),
  ];
}

function statistics(layer) {
  const many = layer.calls.length > 1 ? ", at the call that they fit least" : "";
  const rows = [["batch", `as they are, by itself${many}`], ["eval", "as they are, in eval"], ["recalibrated", "recalibrated, in eval"]]
    .filter(([which]) => layer.off[which])
    .map(([which, label]) => [label, number(layer.off[which].mean), number(layer.off[which].ratio), told(layer, which)]);
  if (!rows.length || !layer.channels) return [];
  const c = layer.channels, after = flow === "recalibrated" && c.after_mean.length > 0;
  const running = { mean: after ? c.after_mean : c.mean, var: after ? c.after_var : c.var };
  const points = (which, place) => c.received.flatMap((call, at) => c.index.map((channel, i) => {
    const x = value(running[which][i]), y = value(call[which][i]), e = value(call[`${which}_error`][i]);
    const told = `channel ${channel}${at ? `, call ${at + 1}` : ""}: running ${number(x)}, batch ${number(y)} ± ${number(2 * e)}`;
    return { channel, at, told, raw: [x, y, e], far: Math.abs(x - y) >= noise * e && x !== y, ...place(x, y, e, i) };
  }));
  const mean = points("mean", (x, y, e, i) => {
    const deviation = Math.sqrt(Math.max(value(running.var[i]), 0) + layer.eps);
    return { x, y: (y - x) / deviation, error: e / deviation };
  });
  const variance = points("var", (x, y, e) => (
    { x: x + layer.eps, y: (y + layer.eps) / (x + layer.eps), error: e / (x + layer.eps) }));
  const several = c.received.length > 1;
  const notes = [
    c.index.length < c.total ? `${c.index.length} of ${c.total} channels, thinned evenly by distance.` : "",
    `A channel on the dashed line agrees with the batches. Bars are two standard errors, from sample to sample; filled marks are ${noise} and more from the line.`,
    several ? `By call: ${c.received.map((_, at) => `${at + 1} ${DOTS[at].name}`).join(", ")}${layer.calls.length > c.received.length ? "; later calls are not drawn" : ""}.` : "",
  ];
  const worst = c.index.slice(0, 5).flatMap((_, i) => c.received.map((_, at) => {
    const m = mean[at * c.index.length + i], v = variance[at * c.index.length + i];
    return [String(m.channel), ...(several ? [String(at + 1)] : []), ...[m.raw, v.raw].flatMap(([x, y, e]) => [number(x), `${number(y)} ± ${number(2 * e)}`])];
  }));
  return [
    element("h4", {}, `${after ? "Recalibrated" : "Running"} statistics beside those of the batches`),
    element("p", { class: "note" }, notes.filter(Boolean).join(" ")),
    element("div", { class: "pair" },
      scatter("mean", mean, { log: false, least: 0.5, unit: "batch less running, in sigma" }),
      scatter("variance", variance, { log: true, least: 2, unit: "batch over running" })),
    element("h4", {}, "With and without a fix"),
    table(["statistics", "mean off, sigma", "variance x", "standard errors"], rows, "lrrr"),
    element("details", {}, element("summary", {}, "channels furthest off, in numbers"),
      table(["channel", ...(several ? ["call"] : []), "running mean", "batch mean", "running variance", "batch variance"], worst, "rrrrrr")),
  ];
}

function values(layer) {
  const title = element("h4", {}, "Its input, once normalised");
  const described = { batch: "batch statistics", running: "running statistics", sample: "those of each sample" };
  const series = [["batch", "in training"], ["eval", "in eval"]]
    .filter(([which]) => layer.values[which])
    .map(([which, when]) => {
      const { used, counts, outside } = layer.values[which];
      return { counts, style: which, label: `${when}, by ${described[used]}`, beyond: outside };
    });
  if (!series.length) {
    return noValues ? [title, element("p", { class: "dim" }, `No histogram: ${noValues}.`)] : [];
  }
  return [
    title,
    element("ul", { class: "legend" }, ...series.map((one) => element("li", {}, element("i", { class: `key line ${one.style}` }), ` ${one.label}${one.beyond ? `; ${number(one.beyond / 100)} % beyond ±${reach}` : ""}`))),
    spreads(series, reach),
    element("p", { class: "note" }, "First batch, all channels, before weight and bias; in standard deviations."),
  ];
}

function callSites(layer) {
  if (!layer.calls.length) return [];
  const rows = layer.calls.map((call, i) => [
    String(i + 1), call.site ? `${call.site} ${call.function.split(".").pop()}` : "-", `${call.shape.join(" x ")}${call.dtype === "float32" ? "" : ` ${call.dtype}`}`, number(call.mean), number(call.var),
    call.off ? number(call.off.mean) : "-", call.off ? number(call.off.ratio) : "-"]);
  const shared = layer.calls.length + layer.more_calls > 1
    ? [element("p", { class: "note" }, `${layer.more_calls ? `And ${layer.more_calls} more calls. ` : ""}One set of running statistics serves all calls; one norm per call gives each its own, those in its row.`)] : [];
  return [
    element("h4", {}, layer.calls.length > 1 ? "Where it is called" : "Where it is called from"),
    table(["call", "line", "input", "mean", "variance", "mean off, sigma", "variance x"], rows, "rllrrrr"),
    ...shared,
  ];
}

// ---------------------------------------------------------------------------------- the start

makeStrip();
read(-1);
explain();
for (const chip of document.querySelectorAll("[data-open]")) {
  chip.addEventListener("click", () => open(+chip.dataset.open, true));
}
for (const chip of document.querySelectorAll("[data-filter]")) {
  chip.addEventListener("click", () => {
    document.getElementById("filter").value = chip.dataset.filter;
    filter(chip.dataset.filter);
    strip.scrollIntoView({ block: "center" });
  });
}
const telling = first ?? layers.findIndex((layer) => layer.findings.some((i) => findings[i].severity !== "info"));
if (telling >= 0) open(telling);
