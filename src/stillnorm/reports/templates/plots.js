// Elements and plots; everything from the model is set as text, never as markup.
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
function shape(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
// JSON has no infinities: they come as words.
const value = (x) => ({ inf: Infinity, "-inf": -Infinity, nan: NaN })[x] ?? x;

// As `reports.numbers.number` writes it.
function number(given) {
  const x = value(given), size = Math.abs(x);
  if (!Number.isFinite(x)) return String(given);
  if (size === 0) return "0.00";
  if (size < 1e-4 || size >= 1e7) return x.toExponential(1);
  return size < 0.1 ? x.toPrecision(2) : x.toFixed(size < 1000 ? 2 : 0);
}
const short = (x) => String(+x.toPrecision(3));

function table(header, rows, align) {
  const cells = (tag, row) =>
    element("tr", {}, ...row.map((cell, i) => element(tag, { class: align[i] }, cell)));
  return element("div", { class: "scroll" }, element("table", {},
    element("thead", {}, cells("th", header)),
    element("tbody", {}, ...rows.map((row) => cells("td", row)))));
}

// Round numbers on a linear axis; powers of ten, with 2 and 5 where there are few, on the other.
function ticksOf(low, high, log) {
  if (log) {
    const found = [];
    for (let decade = Math.floor(low); decade <= Math.ceil(high); decade++) {
      for (const part of high - low < 2 ? [1, 2, 5] : [1]) {
        const place = decade + Math.log10(part);
        if (place >= low && place <= high) found.push([place, short(10 ** place)]);
      }
    }
    const every = Math.ceil(found.length / 5);
    return found.filter((_, i) => i % every === 0);
  }
  const decade = 10 ** Math.floor(Math.log10(high - low || 1));
  for (const step of [5, 2, 1, 0.5, 0.2].map((part) => part * decade)) {
    const from = Math.ceil(low / step), to = Math.floor(high / step);
    if (to - from >= 2 || step < decade / 4) {
      return Array.from({ length: to - from + 1 }, (_, i) => [(from + i) * step, short((from + i) * step)]);
    }
  }
  return [];
}

// One mark for each of the first calls of a layer.
const DOTS = [
  { name: "diamonds", path: "M0-4.6L4.6 0L0 4.6L-4.6 0Z" },
  { name: "triangles", path: "M0-4.4L4.4 3.4H-4.4Z" },
  { name: "squares", path: "M-3.4-3.4H3.4V3.4H-3.4Z" },
  { name: "triangles pointing down", path: "M0 4.4L4.4-3.4H-4.4Z" },
];

// Running statistics (across) and how far those of the batches are from them (up), with bars of two
// standard errors. On logarithmic axes up is a ratio. `least` is the smallest range up.
function scatter(title, points, { log, least, unit }) {
  const across = 340, up = 250, left = 44, right = 8, top = 8, bottom = 34;
  const figure = element("figure", {}, element("figcaption", {}, title, " ", element("span", { class: "dim" }, unit)));
  const usable = points.filter((p) => [p.x, p.y, p.error].every(Number.isFinite) && (!log || (p.x > 0 && p.y > 0)));
  if (!usable.length) {
    figure.append(element("p", { class: "dim" }, "nothing that can be drawn"));
    return figure;
  }
  const level = usable.every((p) => p.x === usable[0].x); // never estimated: then side by side
  const scale = (x) => (log ? Math.log10(Math.max(x, 1e-30)) : x);
  const axis = (values, reach, from, to, log) => {
    const room = 0.06 * (Math.max(...values) - Math.min(...values)) || 0.5;
    const low = Math.min(...values, -reach) - room, high = Math.max(...values, reach) + room;
    const at = (x) => (from + ((Math.min(Math.max(x, low), high) - low) / (high - low || 1)) * (to - from)).toFixed(1);
    return { at, ticks: ticksOf(low, high, log) };
  };
  const along = (p) => (level ? p.channel : scale(p.x));
  const x = axis(usable.map(along), -Infinity, left, across - right, log && !level);
  const y = axis(usable.map((p) => scale(p.y)), scale(least), up - bottom, top, log);
  const drawn = shape("svg", { viewBox: `0 0 ${across} ${up}`, class: "scatter", role: "img",
    "aria-label": `${title}: ${points.filter((p) => p.far).length} of ${points.length} marks beyond noise` });
  for (const [tick, text] of x.ticks) {
    drawn.append(
      shape("path", { class: "grid", d: `M${x.at(tick)} ${top}V${up - bottom}` }),
      shape("text", { x: x.at(tick), y: up - bottom + 14, class: "middle" }, text));
  }
  for (const [tick, text] of y.ticks) {
    drawn.append(
      shape("path", { class: "grid", d: `M${left} ${y.at(tick)}H${across - right}` }),
      shape("text", { x: left - 5, y: +y.at(tick) + 4, class: "end" }, text));
  }
  drawn.append(
    shape("path", { class: "same", d: `M${left} ${y.at(0)}H${across - right}` }),
    shape("text", { x: across - right, y: up - 3, class: "end axis" }, level ? "channel" : `running ${title}`));
  for (const p of [...usable].reverse()) {
    drawn.append(
      shape("path", { class: p.far ? "bar far" : "bar", d: `M${x.at(along(p))} ${y.at(scale(p.y - 2 * p.error))}V${y.at(scale(p.y + 2 * p.error))}` }),
      shape("path", { class: p.far ? "dot far" : "dot", transform: `translate(${x.at(along(p))} ${y.at(scale(p.y))})`, d: DOTS[p.at].path },
        shape("title", {}, p.told)));
  }
  figure.append(drawn);
  return figure;
}

// Distributions on one axis, -reach to reach, as steps; each in its own line style.
function spreads(series, reach) {
  const across = 700, up = 170, bottom = 22;
  const peak = Math.max(...series.flatMap((one) => one.counts), 1);
  const px = (x) => (((x + reach) / (2 * reach)) * across).toFixed(1);
  const drawn = shape("svg", { viewBox: `0 0 ${across} ${up}`, class: "spread", role: "img",
    "aria-label": series.map((one) => one.label).join(", ") });
  for (let x = -reach; x <= reach; x += 2) {
    drawn.append(
      shape("path", { class: "grid", d: `M${px(x)} 0V${up - bottom}` }),
      shape("text", { x: px(x), y: up - 6, class: x === -reach ? "" : x === reach ? "end" : "middle" }, String(x)));
  }
  for (const one of series) {
    const wide = (2 * reach) / one.counts.length;
    const steps = one.counts.map((n, i) =>
      `V${((up - bottom) * (1 - (0.94 * n) / peak)).toFixed(1)}H${px(-reach + (i + 1) * wide)}`).join("");
    drawn.append(shape("path", { class: `outline ${one.style}`, d: `M0 ${up - bottom}${steps}V${up - bottom}` }));
  }
  return drawn;
}
