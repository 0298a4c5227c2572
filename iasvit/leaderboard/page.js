"use strict";
// What is shown is in the address: #task=…&data=…&kind=…&bits=…&metric=…&view=…&sort=…&model=…, so that a view can be
// kept or sent. Every choice changes the address, and a changed address draws the page.
const data = JSON.parse(document.getElementById("data").textContent);
const panel = document.getElementById("panel");
const details = document.getElementById("details");
const KINDS = { real: "real data", embedded: "mini, embedded", published: "published" };
const VIEWS = { matrix: "Matrix", scatter: "Accuracy and seconds" };
const STEPS = [1, 5, 15, 40]; // per cent of the full-precision value that is lost; a colour for each interval
const NONE = "–";

// ---- Small helpers

/** An HTML element, or an SVG one; children are nodes or texts, attributes that are null or false are left out. */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "circle", "line", "path", "text"].includes(name);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(key, value);
    else if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.filter(child => child !== null));
  return node;
}

/** A name that may break behind "_" and "=". */
const breakable = name => name.split(/(?<=[_=])/).flatMap((part, index) => (index ? [make("wbr"), part] : [part]));

const hidden = text => make("span", { class: "hidden" }, text);
const text = place => data.texts[place ?? 0];
const unique = values => [...new Set(values)];

function signed(number, digits) {
  const shown = Math.abs(number).toFixed(digits);
  return (Number(shown) === 0 ? "±" : number > 0 ? "+" : "−") + shown;
}

const spread = (cell, digits) => (cell.std === undefined ? "" : " ± " + cell.std.toFixed(digits));

/** How much worse than full precision, in units of the metric; below 0 where it is better. */
const loss = (cell, metric) => (metric.higher ? -cell.gap : cell.gap);

/** The colour's class: by the share of the full-precision value that is lost. */
function lossClass(cell, metric) {
  if (cell.gap === undefined || cell.value === undefined) return "";
  const share = (100 * loss(cell, metric)) / Math.abs(cell.value - cell.gap);
  return Number.isFinite(share) ? "loss" + STEPS.filter(step => share >= step).length : "";
}

// ---- The address

const read = () => new URLSearchParams(location.hash.slice(1));

function go(change) {
  const address = read();
  for (const [key, value] of Object.entries(change)) value ? address.set(key, value) : address.delete(key);
  location.hash = address; // draws, by hashchange
}

/** What to show, and a sentence about what the address asks for and is not there. */
function resolve() {
  const address = read();
  const missing = [];
  const choose = (key, known, preferred) => {
    const asked = address.get(key);
    if (known.includes(asked)) return asked;
    const taken = known.includes(preferred) ? preferred : known[0];
    if (asked) missing.push(`${key} ${asked} is not here: ${taken} is shown.`);
    return taken;
  };
  const named = { task: address.get("task"), dataset: address.get("data"), kind: address.get("kind") };
  const fits = table => Object.entries(named).every(([key, value]) => value === null || table[key] === value);
  const found = data.tables.find(fits);
  if (!found) missing.push("The table that the address names is not here: the first one is shown.");
  const table = found ?? data.tables[0];
  const bits = choose("bits", table.bits, "W4A4");
  const metric = choose("metric", unique(table.cells.filter(cell => cell.bits === bits).map(cell => cell.metric)));
  const cells = table.cells.filter(cell => cell.bits === bits && cell.metric === metric);
  const models = unique(cells.map(cell => cell.model));
  const view = choose("view", Object.keys(VIEWS));
  const timed = unique(cells.filter(isTimed).map(cell => cell.model));
  return { table, bits, metric, cells, models, view, timed, missing,
    model: view === "scatter" && timed.length ? choose("model", timed) : null,
    sort: choose("sort", [...(models.length > 1 ? ["loss"] : []), ...models.map(model => "model:" + model), "method"]),
    reversed: address.get("order") === "reversed" };
}

// ---- Tabs

/** A row of tabs; arrow keys, Home and End move between them, as screen readers announce. */
function tabs(label, options, chosen, choose) {
  const list = make("div", { role: "tablist", "aria-label": label });
  options.forEach(([value, name, small], index) => {
    const selected = value === chosen;
    list.append(make("button", {
      type: "button", role: "tab", id: `${label}-${index}`, "aria-selected": String(selected), "aria-controls": "panel",
      tabindex: selected ? "0" : "-1", click: () => choose(value),
      keydown: event => {
        const to = { ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1, Home: 0, End: -1 };
        if (!(event.key in to)) return;
        event.preventDefault();
        const target = list.children[(to[event.key] + options.length) % options.length];
        target.focus();
        target.click();
      },
    }, name, small ? make("small", {}, small) : null));
  });
  return make("div", { class: "choice" }, make("span", { "aria-hidden": "true" }, label), list);
}

function choices(state) {
  const { table } = state;
  const tables = data.tables.map(one => [one, [one.task, one.dataset].filter(Boolean).join(" · "), KINDS[one.kind] ?? one.kind]);
  const metrics = unique(state.table.cells.filter(cell => cell.bits === state.bits).map(cell => cell.metric));
  const plain = values => values.map(value => [value, value]);
  return [
    tabs("table", tables, table, one => go({ task: one.task, data: one.dataset, kind: one.kind, metric: "", sort: "", order: "", model: "" })),
    tabs("bits", plain(table.bits), state.bits, bits => go({ bits })),
    metrics.length > 1 ? tabs("metric", plain(metrics), state.metric, metric => go({ metric })) : null,
    tabs("view", Object.entries(VIEWS), state.view, view => go({ view })),
  ].filter(Boolean);
}

// ---- The matrix

/** Of a method's cells: the mean difference to full precision, over how many models, and whether it competes. */
function overview(state, method) {
  const cells = state.cells.filter(cell => cell.method === method);
  const known = cells.filter(cell => cell.value !== undefined && cell.gap !== undefined);
  return {
    method, apart: cells.every(cell => cell.apart), count: known.length,
    gap: known.length ? known.reduce((sum, cell) => sum + cell.gap, 0) / known.length : undefined,
    cells: new Map(cells.map(cell => [cell.model, cell])),
  };
}

/**
 * Order: by mean difference, or by one column, the best first. Methods that do not compete come last, and so does what
 * has no value; a mean over half of the models or fewer comes after those over more.
 */
function order(state, rows) {
  const metric = state.table.metrics[state.metric];
  const sign = (metric.higher ? -1 : 1) * (state.reversed ? -1 : 1);
  const byName = (a, b) => a.method.localeCompare(b.method);
  const model = state.sort.startsWith("model:") ? state.sort.slice(6) : null;
  const few = row => 2 * row.count <= state.models.length;
  const key = row => (model === null ? row.gap : row.cells.get(model)?.value);
  return rows.sort((a, b) => {
    if (state.sort === "method") return state.reversed ? byName(b, a) : byName(a, b);
    if (model === null && few(a) !== few(b) && a.apart === b.apart) return few(a) ? 1 : -1;
    if (a.apart !== b.apart) return a.apart ? 1 : -1;
    const [x, y] = [key(a), key(b)];
    if ((x === undefined) !== (y === undefined)) return x === undefined ? 1 : -1;
    return (x === undefined ? 0 : sign * (x - y)) || byName(a, b);
  });
}

function heading(state, key, name, attributes = {}) {
  const sorted = state.sort === key;
  const best = key === "method" ? "ascending" : state.table.metrics[state.metric].higher ? "descending" : "ascending";
  const way = state.reversed ? (best === "ascending" ? "descending" : "ascending") : best;
  const change = () => go({ sort: key, order: sorted && !state.reversed ? "reversed" : "" });
  return make("th", { scope: "col", "aria-sort": sorted ? way : null, ...attributes },
    make("button", { type: "button", id: "sort-" + key, click: change }, ...breakable(name)));
}

function matrixCell(state, cell) {
  if (!cell) return make("td", { class: "value number" }, make("span", { class: "quiet" }, NONE, hidden(" not available")));
  const metric = state.table.metrics[state.metric];
  const failed = cell.value === undefined;
  const value = failed ? "failed" : cell.value.toFixed(metric.digits);
  return make("td", { class: "value number " + lossClass(cell, metric) },
    make("button", { type: "button", tabindex: "-1", "aria-haspopup": "dialog", click: () => show(state, cell) },
      make("span", { class: cell.best ? "best" : null }, value), cell.best ? hidden(" best") : null,
      cell.std === undefined ? null : make("span", { class: "spread" }, " ±" + cell.std.toFixed(metric.digits)),
      cell.note && !failed ? make("sup", { "aria-hidden": "true" }, "†") : null,
      cell.gap === undefined ? null : make("small", {}, hidden(", difference to full precision "), signed(cell.gap, metric.digits))));
}

/** What the admission rules say of a method's cells. */
function rulesCell(row) {
  const cells = [...row.cells.values()];
  const known = cells.filter(cell => cell.rules !== undefined).map(cell => data.rules[cell.rules]);
  if (!known.length) return make("td", { class: "rules quiet" }, "not computed");
  const broken = unique(known.flatMap(rules => rules.broken));
  const parts = [broken.length ? "breaks: " + broken.join("; ") : "keeps the rules"];
  if (known.some(rules => rules.changed)) parts.push("network changed");
  if (known.length < cells.length) parts.push(`known for ${known.length} of ${cells.length}`);
  return make("td", { class: "rules" + (broken.length ? " broken" : ""), title: unique(known.flatMap(rules => rules.text)).join("\n") },
    parts.join("; "));
}

function matrix(state) {
  const { table, models } = state;
  const metric = table.metrics[state.metric];
  const several = models.length > 1, measured = table.kind !== "published";
  const rows = order(state, unique(state.cells.map(cell => cell.method)).map(method => overview(state, method)));
  const full = models.map(model => state.cells.find(cell => cell.model === model && cell.gap !== undefined && cell.value !== undefined));
  const head = make("tr", {},
    heading(state, "method", "method"),
    several ? heading(state, "loss", "mean difference", { class: "number" }) : null,
    ...models.map(model => heading(state, "model:" + model, model, { class: "number" })),
    measured ? make("th", { scope: "col", class: "rules" }, "admission rules") : null);
  const first = make("tr", { class: "full" }, make("th", { scope: "row" }, "full precision"), several ? make("td", {}) : null,
    ...full.map(cell => make("td", { class: "number" }, cell ? (cell.value - cell.gap).toFixed(metric.digits) : NONE)),
    measured ? make("td", {}) : null);
  const body = rows.map(row => make("tr", { "data-method": row.method },
    make("th", { scope: "row" }, ...breakable(row.method)),
    !several ? null : make("td", { class: "number" }, row.gap === undefined ? NONE : signed(row.gap, metric.digits),
      row.gap !== undefined && row.count < models.length ? make("small", { class: "quiet" }, `${row.count} of ${models.length}`) : null),
    ...models.map(model => matrixCell(state, row.cells.get(model))),
    measured ? rulesCell(row) : null));
  const grid = make("table", { class: "matrix", keydown: moveInGrid, focusin: stopAt },
    make("caption", {}, make("span", {}, caption(state))), make("thead", {}, head), make("tbody", {}, first, ...body));
  grid.querySelector("td button")?.setAttribute("tabindex", "0");
  const scroll = make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "matrix of methods and backbones" }, grid);
  return [scroll, legend(metric), notes(state)];
}

function caption(state) {
  const metric = state.table.metrics[state.metric];
  const of = name => unique(state.cells.map(cell => cell[name]).filter(value => value !== undefined && value !== 0)).sort((a, b) => a - b);
  const range = values => (values.length > 1 ? `${values[0]} to ${values.at(-1)}` : values[0]);
  const [seeds, images, errors] = [of("seeds"), of("images"), of("error")];
  return [
    `${state.metric}${metric.higher ? "" : " (lower is better)"} at ${state.bits}`,
    images.length ? `${range(images)} images` : null,
    seeds.length ? (seeds.at(-1) > 1 ? `mean ± standard deviation of ${range(seeds)} seeds` : "one seed") : null,
    errors.length ? `standard error at most ${errors.at(-1).toFixed(metric.digits)}` : null,
  ].filter(Boolean).join(", ") + ". Below each value: its difference to full precision. The best of a column is bold. "
    + "A cell opens its settings and its source; arrow keys move between cells.";
}

function legend(metric) {
  const names = STEPS.map((step, index) => (index ? `${STEPS[index - 1]} to ${step} %` : `less than ${step} %`));
  names.push(`${STEPS.at(-1)} % or more`);
  return make("ul", { class: "legend", "aria-label": "colours" },
    make("li", {}, `${metric.higher ? "Lost" : "Added"}, as a share of the full-precision value:`),
    ...names.map((name, index) => make("li", {}, make("span", { class: "loss" + index }), " " + name)));
}

function notes(state) {
  const found = unique(state.cells.filter(cell => cell.note && cell.value !== undefined).map(cell => text(cell.note)));
  const other = found.length ? `† ${found.length > 1 ? "Each cell says what:" : ""} ${found.slice(0, 3).join("; ")}${found.length > 3 ? "; …" : ""}. ` : "";
  const rules = state.table.kind === "published" ? "Each paper keeps rules of its own, which are not checked here. " : "Admission rules: at most 2ᵇ values a quantizer, whole zero-points, static parameters, activations per tensor, nothing "
    + "but the image in float; computed from the quantized model. ";
  const mean = "Methods that quantize weights only cannot be the best, and come last."
    + (state.models.length > 1 ? " The mean difference is over the backbones that a method has a value for; a mean over half of them or fewer comes after the others." : "");
  return make("p", { class: "quiet" }, other + rules + mean);
}

/** Arrow keys move between the cells' buttons, which are one stop of the Tab key together. */
function moveInGrid(event) {
  const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
  const cell = event.target.closest("td");
  if (!cell || !(event.key in steps)) return;
  event.preventDefault();
  const [down, right] = steps[event.key];
  const rows = cell.closest("table").rows;
  let [y, x] = [cell.parentNode.rowIndex + down, cell.cellIndex + right];
  for (; rows[y]?.cells[x]; y += down, x += right) {
    const button = rows[y].cells[x].querySelector("td button");
    if (button) return button.focus();
  }
}

function stopAt(event) {
  if (!event.target.matches("td button")) return;
  for (const button of event.currentTarget.querySelectorAll("td button")) button.tabIndex = button === event.target ? 0 : -1;
}

// ---- The scatter plot

const isTimed = cell => cell.seconds > 0 && cell.value !== undefined;

/** The cells of one model that can be drawn: those of the device that measured most of them; and how many are left out. */
function drawable(state) {
  const of = state.cells.filter(cell => cell.model === state.model);
  const timed = of.filter(isTimed);
  const counts = new Map();
  for (const cell of timed) counts.set(cell.device, (counts.get(cell.device) ?? 0) + 1);
  const [device] = [...counts].sort((a, b) => b[1] - a[1] || a[0] - b[0])[0];
  const points = timed.filter(cell => cell.device === device).sort((a, b) => a.seconds - b.seconds);
  return { points, device: text(device), elsewhere: timed.length - points.length, without: of.length - timed.length };
}

function scatter(state) {
  if (state.model === null) return [make("p", {}, "These values have no seconds: papers do not report them here.")];
  const { table, bits } = state;
  const metric = table.metrics[state.metric];
  const { points, device, elsewhere, without } = drawable(state);
  const select = make("select", { id: "model", change: event => go({ model: event.target.value }) },
    ...state.timed.map(model => make("option", { selected: model === state.model }, model)));
  const left = [
    elsewhere ? `${elsewhere} measured on another device, which does not compare` : "",
    without ? `${without} without seconds or value` : "",
  ].filter(Boolean).join("; ");
  const figure = make("figure", {});
  const rows = points.map((cell, index) => make("tr", {},
    make("td", { class: "number" }, String(index + 1)), make("th", { scope: "row" }, cell.method),
    make("td", { class: "number" }, cell.value.toFixed(metric.digits) + spread(cell, metric.digits)),
    make("td", { class: "number" }, cell.gap === undefined ? NONE : signed(cell.gap, metric.digits)),
    make("td", { class: "number" }, cell.seconds.toFixed(1))));
  const heads = ["point", "method", state.metric, "difference", "seconds"];
  const list = make("table", {},
    make("caption", {}, make("span", {}, `${state.metric} of ${state.model} at ${bits} and seconds of quantization on ${device}` + (left ? `. Left out: ${left}.` : "."))),
    make("thead", {}, make("tr", {}, ...heads.map(name => make("th", { scope: "col", class: name === "method" ? null : "number" }, name)))),
    make("tbody", {}, ...rows));
  requestAnimationFrame(() => draw(figure, state, points));
  return [
    make("p", {}, make("label", { for: "model" }, "backbone "), select),
    figure,
    make("p", { class: "quiet" }, "Solid line: the best value that so many seconds buy. Dashed line: full precision. "
      + "Hollow points: methods of weights only. A point opens its settings and its source."),
    make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": "the plot's values" }, list),
  ];
}

/** Draw the points: seconds on a logarithmic axis, names beside the points, or numbers where there is no room. */
function draw(figure, state, points) {
  const metric = state.table.metrics[state.metric];
  const width = Math.max(280, figure.clientWidth), height = Math.min(460, Math.max(300, width * 0.5));
  const names = width >= 640;
  const box = { left: 46, right: width - (names ? 170 : 24), top: 14, bottom: height - 42 };
  const full = points.find(cell => cell.gap !== undefined);
  const values = points.map(cell => cell.value).concat(full ? [full.value - full.gap] : []);
  const logs = points.map(cell => Math.log10(cell.seconds));
  const [low, high] = padded(Math.min(...values), Math.max(...values));
  const [early, late] = padded(Math.min(...logs), Math.max(...logs));
  const x = cell => box.left + ((Math.log10(cell.seconds) - early) / (late - early)) * (box.right - box.left);
  const y = value => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "group", "aria-label": `${state.metric} against seconds; the table below has the same values` });
  for (const [seconds, label] of ticks(early, late)) {
    const at = x({ seconds });
    svg.append(make("line", { class: "axis", x1: at, x2: at, y1: box.top, y2: box.bottom }),
      make("text", { x: at, y: box.bottom + 16, "text-anchor": "middle" }, label));
  }
  for (const value of round(low, high)) {
    svg.append(make("line", { class: "axis", x1: box.left, x2: box.right, y1: y(value), y2: y(value) }),
      make("text", { x: box.left - 6, y: y(value) + 4, "text-anchor": "end" }, Number(value.toPrecision(6)).toString()));
  }
  svg.append(make("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, "seconds of quantization"));
  if (full) svg.append(make("line", { class: "full", x1: box.left, x2: box.right, y1: y(full.value - full.gap), y2: y(full.value - full.gap) }));
  svg.append(make("path", { class: "front", d: front(points, metric).map((cell, index) =>
    (index ? `H${x(cell)}V${y(cell.value)}` : `M${x(cell)} ${y(cell.value)}`)).join("") }));
  const taken = points.map(cell => ({ x: x(cell) - 6, y: y(cell.value) + 4, width: 12 })); // labels cover no point
  const labels = [];
  const tip = make("div", { id: "tip", hidden: true });
  points.forEach((cell, index) => {
    const label = names ? cell.method : String(index + 1);
    const place = free(taken, x(cell) + 9, y(cell.value) + 4, label.length * (names ? 6.6 : 8), box);
    if (Math.abs(place - y(cell.value) - 4) > 8) {
      svg.append(make("line", { class: "lead", x1: x(cell), y1: y(cell.value), x2: x(cell) + 8, y2: place - 4 }));
    }
    labels.push(make("text", { x: x(cell) + 9, y: place, "aria-hidden": "true" }, label));
    const words = `${cell.method}\n${state.metric} ${cell.value.toFixed(metric.digits)}${spread(cell, metric.digits)}`
      + (cell.gap === undefined ? "" : ` (${signed(cell.gap, metric.digits)})`) + `\n${cell.seconds.toFixed(1)} seconds`;
    const over = () => {
      tip.textContent = words;
      tip.hidden = false;
      tip.style.left = Math.min(x(cell) + 12, width - tip.offsetWidth) + "px";
      tip.style.top = Math.max(0, y(cell.value) - tip.offsetHeight - 10) + "px";
    };
    const out = () => { tip.hidden = true; };
    const open = () => show(state, cell);
    svg.append(make("g", { class: "point" + (cell.apart ? " apart" : ""), tabindex: "0", role: "button", "aria-label": words.replaceAll("\n", ", "),
      pointerenter: over, focus: over, pointerleave: out, blur: out, click: open,
      keydown: event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); open(); } } },
    make("circle", { cx: x(cell), cy: y(cell.value), r: 6 })));
  });
  svg.append(...labels);
  figure.replaceChildren(svg, tip);
}

function padded(low, high) {
  const room = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - room, high + room];
}

/** About five round numbers between two. */
function round(low, high) {
  const power = 10 ** Math.floor(Math.log10((high - low) / 5));
  const step = [1, 2, 5, 10].map(factor => factor * power).find(one => (high - low) / one <= 6);
  const first = Math.ceil(low / step);
  return [...Array(Math.floor(high / step) - first + 1).keys()].map(index => (first + index) * step);
}

/** Seconds at 1, 2 and 5 times powers of ten, only the powers where those would be many. */
function ticks(early, late) {
  const found = [];
  for (let power = Math.floor(early); power <= late; power++) {
    for (const factor of late - early > 1.5 ? [1] : [1, 2, 5]) {
      const seconds = factor * 10 ** power;
      if (Math.log10(seconds) >= early && Math.log10(seconds) <= late) found.push([seconds, seconds.toLocaleString("en")]);
    }
  }
  return found;
}

/** The points that no other beats in both value and seconds; methods of weights only are left out. */
function front(points, metric) {
  const kept = [];
  for (const cell of points.filter(one => !one.apart)) {
    if (!kept.length || (metric.higher ? cell.value > kept.at(-1).value : cell.value < kept.at(-1).value)) kept.push(cell);
  }
  return kept;
}

/** The nearest height to `y` at which a label of this width covers none before it. */
function free(taken, x, y, width, box) {
  const clear = at => at > box.top && at < box.bottom + 12
    && taken.every(one => Math.abs(one.y - at) >= 13 || one.x + one.width < x || x + width < one.x);
  const heights = [...Array(60).keys()].flatMap(step => [y - 4 * step, y + 4 * step]);
  const found = heights.find(clear) ?? y;
  taken.push({ x, y: found, width });
  return found;
}

// ---- The details of a cell

function show(state, cell) {
  const metric = state.table.metrics[cell.metric];
  const verdict = cell.rules === undefined ? null : data.rules[cell.rules];
  const published = state.table.kind === "published";
  const entries = [
    [cell.metric, cell.value === undefined ? "failed" : cell.value.toFixed(metric.digits) + spread(cell, metric.digits)],
    ["difference to full precision", cell.gap === undefined ? "" : signed(cell.gap, metric.digits)],
    ["standard error of the split", cell.error === undefined ? "" : cell.error.toFixed(metric.digits)],
    ["seeds", cell.seeds ? String(cell.seeds) : ""],
    ["images", cell.images ? String(cell.images) : ""],
    ["seconds of quantization", cell.seconds === undefined ? "" : cell.seconds.toFixed(1)],
    ["device", text(cell.device)],
    ["settings", text(cell.settings)],
    ["note", text(cell.note)],
    ["breaks the rules", verdict ? verdict.broken.join("; ") || "no" : ""],
    ["rules, computed", verdict ? verdict.text.join("\n") : ""],
    ["changed network in full precision", text(cell.transformed)],
    [published ? "source" : "commands", text(cell.source)],
  ].filter(([, value]) => value);
  details.replaceChildren(
    make("h2", { id: "details-title" }, `${cell.method}, ${cell.model}, ${cell.bits}`),
    make("dl", {}, ...entries.flatMap(([name, value]) => [make("dt", {}, name), make("dd", { class: name === "commands" ? "source" : null }, value)])),
    make("form", { method: "dialog" }, make("button", {}, "close")));
  details.showModal();
}

// ---- All of it

function render() {
  if (!data.tables.length) {
    panel.replaceChildren(make("p", {}, "There are no values yet."));
    return;
  }
  const state = resolve();
  const focused = document.activeElement?.id;
  document.getElementById("choices").replaceChildren(...choices(state));
  document.getElementById("status").textContent = state.missing.join(" ");
  const heading = make("h2", {}, [state.table.task, state.table.dataset].filter(Boolean).join(" on ") + ", " + state.bits);
  panel.setAttribute("aria-labelledby", [...document.querySelectorAll("[role=tab][aria-selected=true]")].map(tab => tab.id).join(" "));
  panel.replaceChildren(heading, make("p", {}, state.table.headings[state.bits] + "."), ...(state.view === "matrix" ? matrix(state) : scatter(state)));
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
}

details.addEventListener("click", event => { if (event.target === details) details.close(); });
addEventListener("hashchange", render);
let drawn = innerWidth;
addEventListener("resize", () => { if (innerWidth !== drawn) { drawn = innerWidth; render(); } });
render();
