"use strict";
// Draws what the page's tables cannot say: maps of layers and experts, the strip of bits, and curves.
// All texts of results are set as text, never as markup.
const results = JSON.parse(document.getElementById("data").textContent).results;
const tip = document.querySelector(".tip");
const ROW = 20, STRIP = 34, MAX_EXPERT_ROW = 14;
const SERIES = 8;

const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = index => style("--c" + index % SERIES);
const ramp = () => style("--ramp").split(" ").map(hex => [1, 3, 5].map(at => parseInt(hex.slice(at, at + 2), 16)));
const rgb = parts => "rgb(" + parts.map(Math.round).join(",") + ")";

function mixed(stops, share) {
  if (Number.isNaN(share)) return null;  // a logarithm of less than zero
  const place = Math.min(1, Math.max(0, share)) * (stops.length - 1), low = Math.min(stops.length - 2, Math.floor(place));
  return rgb(stops[low].map((value, part) => value + (place - low) * (stops[low + 1][part] - value)));
}

function shown(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 1e-3 && Math.abs(value) < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
}

// A scale from values to shares of the ramp, between their 2nd and 98th percentile, so that one outlier does not make all
// others look alike: of logarithms where these are above zero and far apart.
function scale(values) {
  const sorted = Float64Array.from(values.filter(value => value !== null && value !== undefined)).sort();
  const at = share => sorted[Math.round(share * (sorted.length - 1))];
  const [low, high] = [at(0.02), at(0.98)];
  const place = low > 0 && high / low > 20 ? Math.log : value => value;
  const span = place(high) - place(low);
  const cut = { low: sorted[0] < low, high: sorted[sorted.length - 1] > high };
  return { low, high, cut, of: value => span > 0 ? (place(value) - place(low)) / span : 0.5 };
}

function element(name, parent, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return parent.appendChild(made);
}

function vector(name, parent, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return parent.appendChild(made);
}

// One line of text beside the pointer; a touch elsewhere takes it away.
function showTip(text, event) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const width = tip.offsetWidth, edge = document.documentElement.clientWidth;
  tip.style.left = Math.max(4, Math.min(event.pageX + 12, window.scrollX + edge - width - 8)) + "px";
  tip.style.top = event.pageY + 16 + "px";
}

function explained(target, text) {
  for (const kind of ["pointermove", "pointerdown"]) target.addEventListener(kind, event => showTip(text(event), event));
  target.addEventListener("pointerleave", () => showTip(""));
}

// A canvas as wide as its place, in the pixels of the screen: `draw` is given its context, width and height.
function canvas(parent, height, label, draw) {
  const made = element("canvas", parent, undefined, { role: "img", "aria-label": label });
  made.style.height = height + "px";
  const width = made.clientWidth || parent.clientWidth, ratio = window.devicePixelRatio || 1;
  made.width = Math.max(1, Math.round(width * ratio));
  made.height = Math.max(1, Math.round(height * ratio));
  const context = made.getContext("2d");
  context.scale(ratio, ratio);
  draw(context, width, height);
  return made;
}

// A map of cells: rows with labels, columns with the first and the last named below.
function cellMap(place, rows, columns, height, label, fill, text) {
  place.replaceChildren();
  const labels = element("div", place, undefined, { class: "labels" });
  labels.style.gridTemplateRows = `repeat(${rows.length}, ${height}px)`;
  for (const row of rows) element("span", labels, row, { title: row });
  const gap = height > 6 ? 1 : 0;
  const drawn = canvas(place, rows.length * height, label, (context, width) => {
    const cell = width / columns.length;
    for (let row = 0; row < rows.length; row++) {
      for (let column = 0; column < columns.length; column++) {
        const paint = fill(row, column);
        if (!paint) continue;
        context.fillStyle = paint;
        context.fillRect(column * cell, row * height, Math.max(cell - (cell > 4 ? gap : 0), 0.5), height - gap);
      }
    }
  });
  const axis = element("div", place, undefined, { class: "axis" });
  const middle = columns.length > 8 ? [columns[Math.floor(columns.length / 2)]] : [];
  for (const name of [columns[0], ...middle, ...columns.slice(1).slice(-1)]) element("span", axis, name);
  explained(drawn, event => {
    const box = drawn.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / box.width * columns.length);
    const row = Math.floor((event.clientY - box.top) / box.height * rows.length);
    return rows[row] !== undefined && columns[column] !== undefined ? text(row, column) : "";
  });
}

// Layers by kind and block, experts of one kind together: for each cell the indices of its layers.
function cells(result) {
  const cells = result.kinds.map(() => result.blocks.map(() => []));
  result.names.forEach((name, index) => cells[result.kind[index]][result.block[index]].push(index));
  return cells;
}

// Names as short as tells them apart: their last part, or the last two.
function shortened(names) {
  const short = parts => names.map(name => name.split(".").filter(part => part !== "weight").slice(-parts).join("."));
  for (let parts = 1; parts < 4; parts++) if (new Set(short(parts)).size === names.length) return short(parts);
  return names;
}

function mean(values) {
  const numbers = values.filter(value => value !== null && value !== undefined);
  return numbers.length ? numbers.reduce((sum, value) => sum + value, 0) / numbers.length : null;
}

let figure = "error";

function drawLayers() {
  const means = results.map(result => {
    const values = result.figures[figure] || [];
    return cells(result).map(row => row.map(layers => mean(layers.map(index => values[index]))));
  });
  const range = scale(means.flat(2)), stops = ramp();
  document.querySelectorAll("[data-draw=layers]").forEach(place => {
    const number = Number(place.dataset.result), result = results[number], layers = cells(result);
    const label = `${figure} of each layer, by kind and block`;
    const fill = (row, column) => means[number][row][column] === null ? null : mixed(stops, range.of(means[number][row][column]));
    cellMap(place, shortened(result.kinds), result.blocks, ROW, label, fill, (row, column) => {
      const inside = layers[row][column];
      if (!inside.length) return "";
      const value = index => shown((result.figures[figure] || [])[index]);
      if (inside.length > 1) {
        return `block ${result.blocks[column]}, ${inside.length} layers ${result.kinds[row]}\nmean ${figure}: ${shown(means[number][row][column])}`;
      }
      const others = Object.keys(result.figures).filter(name => name !== figure);
      const lines = others.map(name => `${name}: ${shown(result.figures[name][inside[0]])}`);
      if (result.types[inside[0]]) lines.unshift(`type: ${result.types[inside[0]]}`);
      return [result.names[inside[0]], `${figure}: ${value(inside[0])}`, ...lines].join("\n");
    });
  });
  const legend = document.querySelector(".ramp");
  legend.querySelector(".low").textContent = `${figure} ${range.cut.low ? "≤ " : ""}${shown(Number(range.low.toPrecision(3)))}`;
  legend.querySelector(".high").textContent = `${range.cut.high ? "≥ " : ""}${shown(Number(range.high.toPrecision(3)))}`;
  legend.querySelector(".colours").style.background = `linear-gradient(90deg, ${stops.map(rgb).join(",")})`;
}

function offerFigures() {
  const place = document.querySelector(".choice");
  for (const name of new Set(results.flatMap(result => Object.keys(result.figures)))) {
    const button = element("button", place, name, { type: "button", "aria-pressed": name === figure });
    button.addEventListener("click", () => {
      figure = name;
      for (const other of place.children) other.setAttribute("aria-pressed", other === button);
      drawLayers();
    });
  }
}

function drawStrips() {
  const stops = ramp();
  document.querySelectorAll("[data-draw=strip]").forEach(place => {
    const result = results[Number(place.dataset.result)], bits = result.figures.bits;
    const total = result.weights.reduce((sum, weights) => sum + weights, 0);
    const ends = [];
    result.weights.reduce((sum, weights, index) => ends[index] = sum + weights / total, 0);
    const paint = value => mixed(stops, (value - 1) / 7);
    place.replaceChildren();
    const drawn = canvas(place, STRIP, "bits of each layer", (context, width, height) => {
      let start = 0;
      ends.forEach((end, index) => {
        const stop = Math.round(end * width);
        context.fillStyle = paint(bits[index]);
        context.fillRect(start, 0, Math.max(stop - start, 1), height);
        start = stop;
      });
    });
    explained(drawn, event => {
      const box = drawn.getBoundingClientRect(), share = (event.clientX - box.left) / box.width;
      const index = ends.findIndex(end => share <= end);
      const type = result.types[index] ? `, ${result.types[index]}` : "";
      return index < 0 ? "" : `${result.names[index]}\n${bits[index]} bits${type}`;
    });
    const legend = element("ul", place, undefined, { class: "legend" });
    for (const value of [...new Set(bits)].sort()) {
      const own = result.weights.reduce((sum, weights, index) => sum + (bits[index] === value ? weights : 0), 0) / total;
      const item = element("li", legend);
      element("span", item, undefined, { class: "key" }).style.background = paint(value);
      item.append(`${value} bits `);
      element("b", item, `${(100 * own).toFixed(1)} %`);
    }
  });
}

function drawExperts() {
  const stops = ramp();
  document.querySelectorAll("[data-draw=experts]").forEach(place => {
    const {experts} = results[Number(place.dataset.result)];
    const names = Object.keys(experts), tokens = Object.values(experts);
    const labels = names.map(name => { const number = name.match(/\d+/); return number ? `block ${number[0]}` : name; });
    const widest = Math.max(...tokens.map(row => row.length)), range = scale([0, ...tokens.flat()]);
    const columns = Array.from({ length: widest }, (_, expert) => `expert ${expert}`);
    const height = Math.min(ROW, Math.max(MAX_EXPERT_ROW, 480 / names.length));
    const fill = (row, column) => tokens[row][column] === undefined ? null : mixed(stops, range.of(tokens[row][column]));
    cellMap(place, labels, columns, height, "tokens of each expert", fill, (row, column) => {
      const own = tokens[row], sum = own.reduce((total, count) => total + count, 0) || 1;
      return own[column] === undefined ? "" : `${names[row]}\nexpert ${column}: ${shown(own[column])} tokens, ${(100 * own[column] / sum).toFixed(1)} %`;
    });
  });
}

// Round numbers between two ends, about as many as asked for.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= rough);
  const made = [];
  for (let tick = Math.ceil(low / step) * step; tick <= high + step / 1e6; tick += step) made.push(Number(tick.toPrecision(10)));
  return made;
}

// Lines or points of several series; each point is {x, y, text, error}.
function chart(place, series, words) {
  place.replaceChildren();
  const narrow = place.clientWidth < 520, width = narrow ? 380 : 760, height = narrow ? 260 : 300;
  const frame = { left: 58, right: 18, top: 12, bottom: 44 };
  const points = series.flatMap(one => one.points);
  const xs = points.map(point => point.x), tops = points.map(point => point.y + (point.error || 0));
  const bottoms = points.map(point => point.y - (point.error || 0));
  const pad = (low, high) => high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 1;
  const logarithmic = words.logarithmic && Math.min(...bottoms) > 0;
  const place_y = value => logarithmic ? Math.log10(value) : value;
  let [left, right] = [Math.min(...xs), Math.max(...xs)];
  [left, right] = [left - pad(left, right), right + pad(left, right)];
  let [low, high] = [place_y(Math.min(...bottoms)), place_y(Math.max(...tops))];
  [low, high] = [low - pad(low, high), high + pad(low, high)];
  if (!logarithmic && Math.min(...bottoms) >= 0) low = Math.max(0, low);
  const x = value => frame.left + (value - left) / (right - left) * (width - frame.left - frame.right);
  const y = value => height - frame.bottom - (place_y(value) - low) / (high - low) * (height - frame.top - frame.bottom);
  const svg = vector("svg", place, { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${words.y} against ${words.x}` });
  const marks = logarithmic
    ? ticks(low, high, 4).map(tick => Number((10 ** tick).toPrecision(2)))
    : ticks(low, high, 4);
  for (const mark of new Set(marks)) {
    if (y(mark) > height - frame.bottom || y(mark) < frame.top) continue;
    vector("line", svg, { class: "grid", x1: frame.left, x2: width - frame.right, y1: y(mark), y2: y(mark) });
    vector("text", svg, { x: frame.left - 8, y: y(mark) + 4, "text-anchor": "end" }, shown(mark));
  }
  for (const mark of ticks(left, right, narrow ? 4 : 7)) {
    vector("text", svg, { x: x(mark), y: height - frame.bottom + 18, "text-anchor": "middle" }, shown(mark));
  }
  vector("text", svg, { x: (frame.left + width - frame.right) / 2, y: height - 6, "text-anchor": "middle" }, words.x);
  vector("text", svg, { x: 13, y: (height - frame.bottom + frame.top) / 2, "text-anchor": "middle", transform: `rotate(-90 13 ${(height - frame.bottom + frame.top) / 2})` }, words.y);
  if (words.mark !== undefined) {
    vector("line", svg, { class: "mark", x1: x(words.mark), x2: x(words.mark), y1: frame.top, y2: height - frame.bottom });
    vector("text", svg, { x: x(words.mark) + 6, y: frame.top + 10 }, "budget");
  }
  series.forEach((one, index) => {
    const paint = colour(one.colour === undefined ? index : one.colour);
    if (one.line) {
      const path = one.points.map((point, at) => `${at ? "L" : "M"}${x(point.x).toFixed(1)} ${y(point.y).toFixed(1)}`).join("");
      vector("path", svg, { d: path, fill: "none", stroke: paint, "stroke-width": 2, "stroke-linejoin": "round" });
    }
    for (const point of one.points) {
      if (point.error) {
        vector("line", svg, { x1: x(point.x), x2: x(point.x), y1: y(point.y - point.error), y2: y(point.y + point.error), stroke: paint, "stroke-width": 1.5 });
      }
      const dot = vector("circle", svg, { cx: x(point.x), cy: y(point.y), r: one.line ? 3 : 5, fill: paint });
      if (point.name) {
        const end = x(point.x) > width * 0.65;
        vector("text", svg, { class: "name", x: x(point.x) + (end ? -9 : 9), y: y(point.y) - 7, "text-anchor": end ? "end" : "start" }, point.name);
      }
      explained(dot, () => point.text);
    }
  });
}

function drawCharts() {
  document.querySelectorAll("[data-draw=budget]").forEach(place => {
    const budget = results[Number(place.dataset.result)].budget;
    const points = budget.points.map(([x, y]) => ({ x, y, text: `${shown(x)} bits per weight\n${shown(y)} nats per token` }));
    const words = { x: "bits per weight", y: "expected loss, nats per token", mark: budget.bits_per_weight, logarithmic: true };
    chart(place, [{ points, line: true }], words);
  });
  document.querySelectorAll("[data-draw=tuning]").forEach(place => {
    const series = results.map((result, number) => ({
      colour: number,
      line: true,
      points: result.tuning.filter(check => check.divergence !== null).map(check => ({
        x: check.step, y: check.divergence, text: `step ${check.step}\ndivergence ${shown(check.divergence)}`,
      })),
    })).filter(one => one.points.length);
    if (series.length) chart(place, series, { x: "steps", y: "divergence, nats per token" });
  });
  document.querySelectorAll("[data-draw=trade]").forEach(place => {
    const series = results.map((result, number) => ({ result, number })).filter(
      ({ result }) => result.judgement && result.judgement.divergence !== null && result.judgement.divergence !== undefined,
    ).map(({ result, number }) => ({
      colour: number,
      points: [{
        x: result.bytes / 1e6, y: result.judgement.divergence, error: result.judgement.divergence_error, name: result.name,
        text: `${result.name}\n${shown(result.bytes / 1e6)} MB, ${shown(result.bits)} bits per weight\ndivergence ${shown(result.judgement.divergence)}`,
      }],
    }));
    place.closest("section").hidden = !series.length;
    if (series.length) chart(place, series, { x: "MB on disk", y: "divergence, nats per token" });
  });
}

function draw() {
  drawLayers();
  drawStrips();
  drawExperts();
  drawCharts();
}

offerFigures();
draw();
document.querySelectorAll("[data-tip]").forEach(part => explained(part, () => part.dataset.tip));
document.addEventListener("pointerdown", event => { if (!event.target.closest("canvas, circle, [data-tip]")) showTip(""); });
let width = window.innerWidth;
window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; draw(); } });
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
window.addEventListener("beforeprint", draw);
window.addEventListener("afterprint", draw);
