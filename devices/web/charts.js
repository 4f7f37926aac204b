// Two charts as SVG, made anew each time: runs of each model on one axis, and each model's pace over time.

const NS = "http://www.w3.org/2000/svg";
const DOTS = 160;

function make(tag, attributes, text) {
  const made = document.createElementNS(NS, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.floor((sorted.length - 1) / 2)];
}

function quantile(values, share) {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
}

// Times as the whole page writes them, in tables and in charts: three digits, in microseconds below a millisecond.
export const number = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
const scale = (us) => (Number(us.toPrecision(3)) >= 1000 ? { unit: "ms", by: 1000 } : { unit: "µs", by: 1 });
export function time(us) {
  const { unit, by } = scale(us);
  return `${number(us / by)} ${unit}`;
}
export function range([low, high]) {
  const { unit, by } = scale(high);
  return `${number(low / by)}–${number(high / by)} ${unit}`;
}

// 1, 2 or 5 times a power of ten, about so many of them in the range.
function stepOf(range, count) {
  const raw = range / count, power = 10 ** Math.floor(Math.log10(raw));
  return power * ([1, 2, 5].find((factor) => raw <= factor * power * 1.001) ?? 10);
}

function ticks(low, high, count) {
  const step = stepOf(high - low, count), found = [];
  for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-6; place += 1) found.push(place * step);
  return found;
}

function place(holder, label, width, height) {
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  holder.replaceChildren(svg);
  return svg;
}

// A row for each model: its name and median above, dots below on an axis that all share. The median is that of all
// runs once it is known (`p50Us`), before that the one of the dots.
export function drawLatency(holder, models) {
  const width = Math.max(280, Math.min(820, holder.clientWidth || 340)), row = 50, height = row * models.length + 24;
  const high = 1.08 * Math.max(...models.map(({ medians }) => quantile(medians.map(({ ms }) => ms), 0.97)));
  const x = (ms) => 4 + (Math.min(ms, high) / high) * (width - 8);
  const middleOf = ({ medians, p50Us }) => (p50Us ? p50Us / 1000 : median(medians.map(({ ms }) => ms)));
  const said = models.map((model) => `${model.name} ${time(1000 * middleOf(model))}`).join(", ");
  const svg = place(holder, `Median time for one run: ${said}`, width, height);
  const { unit, by } = scale(1000 * high);
  for (const tick of ticks(0, high, width > 500 ? 6 : 4)) {
    svg.append(make("line", { class: "grid", x1: x(tick), x2: x(tick), y1: 0, y2: height - 20 }));
    svg.append(make("text", { class: tick ? "middle" : "", x: x(tick), y: height - 5 }, tick ? String(Number(((1000 * tick) / by).toPrecision(3))) : `0 ${unit}`));
  }
  models.forEach((model, index) => {
    const { name, colour, medians } = model, top = index * row, values = medians.map(({ ms }) => ms), middle = middleOf(model);
    const room = Math.floor((width - 85) / 8.6); // letters beside the figure
    svg.append(make("text", { class: "name", x: 4, y: top + 15 }, name.length > room ? `${name.slice(0, room - 1)}…` : name));
    svg.append(make("text", { class: "value", x: width - 4, y: top + 15 }, time(1000 * middle)));
    const every = Math.ceil(values.length / DOTS);
    values.forEach((ms, at) => {
      if (at % every) return;
      const y = top + 32 + (((at * 7) % 5) - 2) * 2.2; // apart, so that equal ones can be told
      svg.append(make("circle", { cx: x(ms), cy: y, r: 2.6, fill: colour, "fill-opacity": 0.4 }));
    });
    svg.append(make("line", { x1: x(middle), x2: x(middle), y1: top + 22, y2: top + 42, stroke: colour, "stroke-width": 3, "stroke-linecap": "round" }));
  });
}

// Medians of stretches of time, in percent of each model's own beginning.
function paceOf(points) {
  const count = Math.min(40, Math.max(2, Math.floor(points.length / 3))), size = points.length / count;
  const parts = Array.from({ length: count }, (_, part) => points.slice(Math.floor(part * size), Math.floor((part + 1) * size))).filter((part) => part.length);
  const first = median(points.slice(0, Math.max(1, Math.floor(points.length / 10))).map(({ ms }) => ms));
  return parts.map((part) => ({ x: median(part.map(({ x }) => x)), change: (median(part.map(({ ms }) => ms)) / first - 1) * 100 }));
}

export function drawPace(holder, series, unit) {
  if (!series.length) return;
  const width = Math.max(280, Math.min(820, holder.clientWidth || 340)), height = 210;
  const left = 48, right = width - 10, top = 10, bottom = height - 24;
  const lines = series.map((one) => ({ ...one, path: paceOf(one.points) }));
  const all = lines.flatMap(({ path }) => path);
  const late = Math.max(...all.map((point) => point.x), 0.01);
  const low = Math.min(-10, ...all.map((point) => point.change)), high = Math.max(10, ...all.map((point) => point.change));
  const x = (value) => left + (value / late) * (right - left);
  const y = (change) => bottom - ((change - low) / (high - low)) * (bottom - top);
  const said = lines.map(({ name, path }) => `${name} ${path.at(-1).change.toFixed(0)} %`).join(", ");
  const legend = document.createElement("div");
  legend.className = "legend";
  for (const { name, colour } of lines) {
    const entry = document.createElement("span"), swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = colour;
    entry.append(swatch, name);
    legend.append(entry);
  }
  const svg = place(holder, `Change of pace since the beginning: ${said}`, width, height);
  holder.prepend(legend);
  for (const tick of ticks(low, high, 4)) {
    const isZero = Math.abs(tick) < 1e-9;
    svg.append(make("line", { class: isZero ? "zero" : "grid", x1: left, x2: right, y1: y(tick), y2: y(tick), "stroke-width": isZero ? 2 : 1 }));
    svg.append(make("text", { class: "end", x: left - 6, y: y(tick) + 4 }, `${tick > 1e-9 ? "+" : tick < -1e-9 ? "\u2212" : ""}${Math.abs(Math.round(tick))} %`));
  }
  for (const tick of ticks(0, late, width > 500 ? 8 : 5)) {
    svg.append(make("text", { class: "middle", x: x(tick), y: height - 6 }, `${Number(tick.toPrecision(3))}${tick ? "" : ` ${unit}`}`));
  }
  for (const { path, colour } of lines) {
    const points = path.map((point) => `${x(point.x).toFixed(1)},${y(point.change).toFixed(1)}`).join(" ");
    svg.append(make("polyline", { points, fill: "none", stroke: colour, "stroke-width": 2.2, "stroke-linejoin": "round" }));
  }
}
