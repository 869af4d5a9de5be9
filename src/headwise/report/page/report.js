"use strict";
const D = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** An element with properties, and children that are elements or plain text (never markup). */
function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(props)) {
    if (key === "class") node.className = value;
    else if (key === "style") Object.assign(node.style, value);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}
function svg(tag, props = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(props)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

const words = (name) => name.replaceAll("_", " ");
const headName = (layer, head) => `L${layer}H${head}`;
const roleByName = Object.fromEntries(D.role_names.map((role) => [role.name, role]));
const mainRole = (name) => roleByName[(D.roles[name] || [])[0]] || roleByName.mixed;
const exists = (layer, head) => headName(layer, head) in D.roles;
const heat = (share) => `rgba(var(--heat), ${(0.04 + 0.96 * Math.min(1, Math.max(0, share))).toFixed(3)})`;
function number(value, digits = 3) {
  if (value === null || value === undefined) return "";
  if (value !== 0 && (Math.abs(value) < 0.001 || Math.abs(value) >= 1e5)) return value.toExponential(1);
  return Number(value.toPrecision(digits)).toString();
}

const state = { probe: "role", head: null, query: 0 };

// ---- findings -------------------------------------------------------------------------------------------------------
for (const finding of D.findings) {
  const chips = finding.heads.slice(0, 12).map((name) => el("button", { class: "chip", onclick: () => choose(name, true) }, name));
  $("findings").append(el("div", { class: "finding" }, el("h3", {}, finding.title), el("p", {}, finding.text), ...chips));
}

// ---- the head map ---------------------------------------------------------------------------------------------------
function grid(cell, small) {
  const node = el("div", { class: small ? "grid small" : "grid" });
  node.style.gridTemplateColumns = `34px repeat(${D.num_heads}, minmax(${small ? 12 : 20}px, 1fr))`;
  node.append(el("span", { class: "label" }));
  for (let head = 0; head < D.num_heads; head++) node.append(el("span", { class: "label" }, D.num_heads <= 40 || head % 4 === 0 ? `H${head}` : ""));
  for (let layer = 0; layer < D.num_layers; layer++) {
    node.append(el("span", { class: "label" }, `L${layer}`));
    for (let head = 0; head < D.num_heads; head++) node.append(cell(layer, head));
  }
  return node;
}

/** The value at the color scale's ends: from 0 (or the least, if negative) to the largest. */
function range(probe) {
  const values = D.probes[probe].flat().filter((v) => v !== null);
  return [Math.min(0, ...values), Math.max(...values, 1e-9)];
}

function drawMap() {
  const showRoles = state.probe === "role";
  const [low, high] = showRoles ? [0, 1] : range(state.probe);
  const cells = grid((layer, head) => {
    const name = headName(layer, head);
    if (!exists(layer, head)) return el("span", { class: "cell none" });
    const value = showRoles ? null : D.probes[state.probe][layer][head];
    const share = showRoles ? 0 : (value - low) / (high - low);
    const cell = el("button", {
      class: name === state.head ? "cell chosen" : "cell", "data-head": name, role: "gridcell", tabindex: name === state.head ? "0" : "-1",
      title: showRoles ? `${name}: ${(D.roles[name] || []).join(", ") || "mixed"}` : `${name}: ${number(value, 4)} ${D.units[state.probe]}`,
      "aria-label": showRoles ? `${name} ${mainRole(name).name}` : `${name} ${number(value, 4)}`,
      style: { background: showRoles ? mainRole(name).color : heat(share) },
      onclick: () => choose(name), onkeydown: move,
    }, showRoles || D.num_heads > 20 ? "" : number(value, 2));
    if (!showRoles && share > 0.62) cell.style.color = "#fff";
    return cell;
  }, false);
  $("map").replaceChildren(cells);
  const legend = showRoles
    ? D.role_names.filter((r) => r.name === "mixed" || r.probe in D.probes).map((role) => el("span", { title: role.about }, el("span", { class: "swatch", style: { background: role.color } }), role.name))
    : [el("span", {}, `${number(low)} `), el("span", { class: "scale", style: { background: `linear-gradient(to right, ${heat(0)}, ${heat(1)})` } }), el("span", {}, ` ${number(high)} ${D.units[state.probe]}`)];
  $("legend").replaceChildren(...legend);
  $("probe-about").textContent = showRoles ? "The main role of each head; click one to see where it looks." : (D.probe_notes[state.probe] || {}).about;
  for (const tab of $("probe-tabs").children) tab.setAttribute("aria-selected", String(tab.dataset.probe === state.probe));
}

for (const probe of ["role", ...Object.keys(D.probes)]) {
  $("probe-tabs").append(el("button", { role: "tab", "data-probe": probe, onclick: () => { state.probe = probe; drawMap(); } }, words(probe)));
}

function move(event) {
  const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
  if (!step) return;
  event.preventDefault();
  const [layer, head] = state.head.slice(1).split("H").map(Number);
  if (exists(layer + step[0], head + step[1])) {
    choose(headName(layer + step[0], head + step[1]));
    document.querySelector(`[data-head="${state.head}"]`).focus();
  }
}

// ---- one head -------------------------------------------------------------------------------------------------------
function drawCard() {
  const [layer, head] = state.head.slice(1).split("H").map(Number);
  const rows = Object.entries(D.probes).map(([probe, values]) => {
    const value = values[layer][head];
    const all = values.flat().filter((v) => v !== null);
    const rank = 1 + all.filter((v) => v > value).length;
    return el("tr", {}, el("td", { title: (D.probe_notes[probe] || {}).about || "" }, words(probe)), el("td", { class: "number" }, number(value)), el("td", { class: "number rank" }, `#${rank}`));
  });
  const roles = D.roles[state.head] || [];
  const note = roles.length ? roles.map((name) => `${name}: ${roleByName[name].about}`).join("; ") + "." : "Mixed: none of the named roles.";
  const plan = D.plan && D.plan.full ? (D.plan.full.includes(state.head) ? " Keeps its full cache under the plan." : " Streams under the plan.") : "";
  $("card").replaceChildren(
    el("h3", {}, el("span", { class: "swatch", style: { background: mainRole(state.head).color } }), state.head),
    el("p", { class: "note" }, note + plan),
    el("table", {}, el("tbody", {}, ...rows)),
  );
}

// ---- the viewer -----------------------------------------------------------------------------------------------------
const decoded = {};
function weightsOf(name) {
  if (!(name in D.view.weights)) return null;
  if (!(name in decoded)) decoded[name] = Uint8Array.from(atob(D.view.weights[name]), (c) => c.charCodeAt(0));
  return decoded[name];
}
/** The weight (0..1) of a query on a key: stored as square roots in bytes, the lower triangle only where causal. */
function weight(data, query, key) {
  if (D.view.causal && key > query) return 0;
  const byte = data[D.view.causal ? (query * (query + 1)) / 2 + key : query * D.view.columns + key];
  return (byte / 255) ** 2;
}
function shown(token) {
  return token.replaceAll("\n", "↵\n").replaceAll("\t", "⇥");
}

function drawViewer() {
  const data = weightsOf(state.head);
  $("viewer-head").textContent = state.head;
  if (!data) { $("tokens").textContent = "This head is not among those captured for the viewer."; return; }
  const tokens = D.view.tokens.slice(0, D.view.columns).map((text, i) => {
    const unseen = D.view.causal && i > state.query;
    const value = weight(data, state.query, i);
    return el("span", {
      class: `tok${i === state.query ? " query" : ""}${unseen ? " unseen" : ""}`, "data-i": i, "data-weight": value.toFixed(4),
      title: `${i}: ${(100 * value).toFixed(1)} %`, style: { background: unseen ? "none" : `rgba(var(--heat), ${Math.sqrt(value).toFixed(3)})` },
      onclick: () => { state.query = i; drawViewer(); },
    }, D.view.tokens.length === new Set(D.view.tokens).size && /^\d+$/.test(text) ? `${text} ` : shown(text));
  });
  $("tokens").replaceChildren(...tokens);
  drawWeights(data);
}

function drawWeights(data) {
  const canvas = $("weights"), { rows, columns } = D.view;
  canvas.width = columns;
  canvas.height = rows;
  const context = canvas.getContext("2d"), image = context.createImageData(columns, rows);
  const [r, g, b] = getComputedStyle(document.documentElement).getPropertyValue("--heat").split(",").map(Number);
  for (let q = 0; q < rows; q++) for (let k = 0; k < columns; k++) {
    const at = 4 * (q * columns + k);
    image.data.set([r, g, b, 255 * Math.sqrt(weight(data, q, k))], at);
    if (q === state.query && image.data[at + 3] < 26) image.data[at + 3] = 26;
  }
  context.putImageData(image, 0, 0);
}
$("weights").addEventListener("click", (event) => {
  const box = event.target.getBoundingClientRect();
  state.query = Math.min(D.view.rows - 1, Math.floor(((event.clientY - box.top) / box.height) * D.view.rows));
  drawViewer();
});

function choose(name, scroll = false) {
  state.head = name;
  drawMap();
  drawCard();
  drawViewer();
  if (scroll) $("heads-section").scrollIntoView({ behavior: "smooth" });
}

// ---- importance -----------------------------------------------------------------------------------------------------
function drawImportance() {
  const table = D.probes.ablation_importance;
  if (!table) return;
  $("importance-section").hidden = false;
  const heads = [];
  table.forEach((row, layer) => row.forEach((value, head) => { if (value !== null) heads.push({ name: headName(layer, head), value }); }));
  heads.sort((a, b) => b.value - a.value);
  const width = 1080, height = 190, left = 46, top = Math.max(...heads.map((h) => h.value)), bottom = Math.min(0, ...heads.map((h) => h.value));
  const y = (v) => 12 + (height - 24) * (1 - (v - bottom) / (top - bottom || 1)), step = (width - left - 8) / heads.length;
  const bars = heads.map((h, i) => svg("rect", {
    x: left + i * step, y: Math.min(y(h.value), y(0)), width: Math.max(1, step - 2), height: Math.max(1, Math.abs(y(h.value) - y(0))), fill: mainRole(h.name).color,
    style: "cursor:pointer", onclick: () => choose(h.name, true),
  }, svg("title", {}, `${h.name} (${mainRole(h.name).name}): ${number(h.value)} nats per token`)));
  const marks = [top, 0].map((v) => svg("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, number(v, 2)));
  $("importance").append(el("div", { class: "chart" }, el("h3", {}, "Rise of the loss when a head is taken away"), el("p", { class: "note" }, "Exact, one head at a time, nats per token; colored by role. Click a bar to see the head."),
    svg("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%" }, svg("line", { class: "axis", x1: left, x2: width, y1: y(0), y2: y(0) }), ...bars, ...marks)));
}

function drawPruning() {
  if (!D.pruning) return;
  const { counts, greedy, random, removable } = D.pruning;
  const width = 1080, height = 250, left = 56, base = greedy[0], most = Math.max(base * 1.13, Math.min(1.6 * base, greedy[greedy.length - 1] * 1.03));
  const x = (n) => left + ((width - left - 150) * n) / counts[counts.length - 1], y = (v) => 14 + (height - 44) * (1 - (Math.min(v, most) - base * 0.97) / (most - base * 0.97));
  const path = (values) => values.map((v, i) => `${i ? "L" : "M"}${x(counts[i]).toFixed(1)},${y(v).toFixed(1)}`).join("");
  const lines = random.map((values) => svg("path", { class: "line", d: path(values), stroke: "var(--soft)", "stroke-dasharray": "5 4" }));
  const rules = [[0.01, "+1 %"], [0.03, "+3 %"], [0.1, "+10 %"]].map(([rise, label]) => svg("g", {}, svg("line", { class: "axis", x1: left, x2: x(counts[counts.length - 1]), y1: y(base * (1 + rise)), y2: y(base * (1 + rise)) }), svg("text", { x: left - 6, y: y(base * (1 + rise)) + 4, "text-anchor": "end" }, label)));
  const ticks = counts.filter((_, i) => i % 2 === 0 || i === counts.length - 1).map((n) => svg("text", { x: x(n), y: height - 8, "text-anchor": "middle" }, String(n)));
  const end = x(counts[counts.length - 1]) + 10;
  const names = [svg("text", { x: end, y: y(greedy[greedy.length - 1]) + 4 }, "least important first"), ...(random.length ? [svg("text", { x: end, y: y(random[0][random[0].length - 1]) + (Math.abs(y(random[0].at(-1)) - y(greedy.at(-1))) < 16 ? 20 : 4) }, "random order")] : [])];
  $("pruning").append(el("div", { class: "chart" }, el("h3", {}, "How many heads can go"), el("p", { class: "note" }, `Loss on text as heads are closed one after another: ${removable["1%"]} before it rises by 1 %, ${removable["3%"]} before 3 %, ${removable["10%"]} before 10 %. Heads closed, from left to right.`),
    svg("svg", { viewBox: `0 0 ${width} ${height}`, width: "100%" }, ...rules, ...lines, svg("path", { class: "line", d: path(greedy), stroke: "var(--accent)" }), ...ticks, ...names)));
}

// ---- the plan -------------------------------------------------------------------------------------------------------
function drawPlan() {
  if (!D.plan) return;
  $("plan-section").hidden = false;
  const full = new Set(D.plan.full || []);
  $("plan-map").append(
    el("p", { class: "note" }, `${full.size} heads keep everything; ${D.plan.streaming} keep the first ${D.plan.sink} and the last ${D.plan.recent} tokens.`),
    grid((layer, head) => {
      const name = headName(layer, head);
      if (!exists(layer, head)) return el("span", { class: "cell none" });
      return el("span", { class: "cell", title: name, style: { background: full.has(name) ? "var(--accent)" : "var(--line)" } });
    }, true));
  const rows = Object.entries(D.metrics).filter(([name]) => name in D.plan.without).map(([name, metric]) => {
    const before = D.plan.without[name], after = D.plan.with[name], change = before ? (100 * (after - before)) / before : 0;
    const show = (v) => v.toLocaleString("en", { minimumFractionDigits: metric.digits, maximumFractionDigits: metric.digits });
    return el("tr", {}, el("td", {}, metric.label), el("td", { class: "number" }, show(before)), el("td", { class: "number" }, show(after)), el("td", { class: "number rank" }, `${change >= 0 ? "+" : ""}${change.toFixed(1)} %`));
  });
  $("plan-table").append(el("table", {}, el("thead", {}, el("tr", {}, el("th", {}, ""), el("th", { class: "number" }, "without"), el("th", { class: "number" }, "with"), el("th", { class: "number" }, "change"))), el("tbody", {}, ...rows)));
  $("plan-code").textContent = "from headwise import Plan\n\nplan = Plan.from_pretrained(\"plan\")\nwith plan(model):\n    model.generate(**inputs)   # keys and values of streaming heads are freed as it goes";
}

// ---- method ---------------------------------------------------------------------------------------------------------
function drawMethod() {
  const rows = Object.keys(D.probes).map((name) => {
    const note = D.probe_notes[name];
    return el("tr", {}, el("td", {}, words(name)), el("td", {}, note.about), el("td", {}, note.paper ? `${note.paper} (${note.year})` : ""));
  });
  $("method").append(el("table", {}, el("tbody", {}, ...rows)));
  for (const { probe, stack, why } of D.skipped) $("method").append(el("p", { class: "note" }, `${words(probe)} was not measured on ${stack}: ${why}.`));
}

const first = (D.findings.find((f) => f.heads.length) || { heads: [Object.keys(D.roles)[0]] }).heads[0];
state.query = Math.max(0, D.view.rows - 5);
drawImportance();
drawPruning();
drawPlan();
drawMethod();
choose(first in D.roles ? first : Object.keys(D.roles)[0]);
