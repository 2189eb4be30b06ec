// Studies of a run: trials by size, measured losses over compute, and the law's frontier once there is one.

import { element, shortNumber, ticks } from "./chart.js";

const HEIGHT = 260, LEFT = 52, RIGHT = 76, TOP = 10, BOTTOM = 26;
let shownKey = "";

function paragraph(text, className) {
  const node = document.createElement("p");
  node.className = className;
  node.textContent = text;
  return node;
}

function sizeTable(sizes) {
  const table = document.createElement("table");
  const head = table.createTHead().insertRow();
  const titles = ["parameters", "done", "open", "failed", "diverged", "loss, nats", "peers"];
  titles.forEach((title, index) => {
    const cell = document.createElement("th");
    cell.textContent = title;
    if (index < 6) cell.className = "number";
    head.append(cell);
  });
  const body = table.createTBody();
  for (const size of sizes) {
    const row = body.insertRow();
    const values = [shortNumber(size.params_n), size.num_done, size.num_open, size.num_failed, size.num_diverged,
      size.loss_nats > 0 ? size.loss_nats.toFixed(4) : "-", size.peers.join(", ")];
    values.forEach((value, index) => {
      const cell = row.insertCell();
      cell.textContent = String(value);
      if (index < 6) cell.className = "number";
    });
  }
  return table;
}

function pathOf(points, toX, toY) {
  return points.map(([x, y], index) => `${index ? "L" : "M"}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`).join("");
}

// Powers of ten in [10^low, 10^high], with 2 and 5 times them where at most `most` fit; the ends if there are too few.
function logTicks(low, high, most) {
  for (const factors of [[1, 2, 5], [1, 3], [1]]) {
    const values = [];
    for (let power = Math.floor(low); power <= high; power++) {
      values.push(...factors.map((factor) => factor * 10 ** power));
    }
    const shown = values.filter((value) => Math.log10(value) >= low - 1e-9 && Math.log10(value) <= high + 1e-9);
    if (shown.length >= 2 && shown.length <= most) return shown;
  }
  return [10 ** low, 10 ** high];
}

function withUnit(value, unit) {
  const text = shortNumber(value);
  return text.includes(" ") ? text + unit : `${text} ${unit}`;
}

// Loss (linear) over compute (logarithmic), a line for every size, the law's frontier dashed.
function lawChart(study, width) {
  const curves = study.curves, frontier = study.fit ? study.fit.frontier : [];
  const points = [...curves.flatMap((curve) => curve.points), ...frontier];
  const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img",
    "aria-label": "loss over compute of every size, with the law's frontier" });
  const logs = points.map((point) => Math.log10(point[0])), losses = points.map((point) => point[1]);
  const xLow = Math.min(...logs), xSpan = Math.max(...logs) - xLow || 1;
  const yLow = Math.min(...losses), ySpan = Math.max(...losses) - yLow || 1;
  const toX = (x) => LEFT + ((Math.log10(x) - xLow) / xSpan) * (width - LEFT - RIGHT);
  const toY = (y) => TOP + (1 - (y - yLow) / ySpan) * (HEIGHT - TOP - BOTTOM);
  for (const value of ticks(yLow, yLow + ySpan, 5)) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: toY(value), y2: toY(value) }));
    svg.append(element("text", { x: LEFT - 6, y: toY(value) + 4, "text-anchor": "end" }, shortNumber(value)));
  }
  for (const value of logTicks(xLow, xLow + xSpan, width / 120)) {
    svg.append(element("text", { x: toX(value), y: HEIGHT - 8, "text-anchor": "middle" }, withUnit(value, "FLOP")));
  }
  for (const curve of curves) {
    svg.append(element("path", { class: "size", d: pathOf(curve.points, toX, toY) }));
    for (const [x, y] of curve.points) svg.append(element("circle", { class: "mark", cx: toX(x), cy: toY(y), r: 2 }));
    const [x, y] = curve.points[curve.points.length - 1];
    svg.append(element("text", { x: toX(x) + 5, y: toY(y) + 4 }, shortNumber(curve.params_n)));
  }
  if (frontier.length) svg.append(element("path", { class: "frontier", d: pathOf(frontier, toX, toY) }));
  return svg;
}

function fitText(fit) {
  const constants = Object.entries(fit.constants).map(([name, value]) => `${name} ${+value.toPrecision(4)}`).join(", ");
  const last = fit.frontier[fit.frontier.length - 1];
  const best = last ? `; at ${withUnit(last[0], "FLOP")} it is ${shortNumber(last[2])} parameters, loss ${last[1].toFixed(4)} nats` : "";
  return `Law (${fit.form}): L = E + (A / N^alpha + B / D^beta)^kappa with ${constants}. ` +
    `N_opt grows as C^${fit.n_opt_exponent.toFixed(3)}${best}${last ? " (dashed: the best by the law)" : ""}. ${fit.reasons.join("; ")}`;
}

function article(study, width) {
  const node = document.createElement("article");
  node.dataset.study = study.study_id;
  const title = document.createElement("h3");
  title.textContent = `${study.study_id}: ${study.stage}, ${study.num_done} of ${study.num_trials} trials done`;
  node.append(title, paragraph(study.stage_reason, "note"));
  if (study.waiting_reason) node.append(paragraph(study.waiting_reason, "note"));
  if (study.seed_noise_ratio > 0) {
    node.append(paragraph(`noise between seeds: ${(100 * study.seed_noise_ratio).toFixed(2)} % of the loss`, "note"));
  }
  const scroll = document.createElement("div");
  scroll.className = "scroll";
  scroll.append(sizeTable(study.sizes));
  node.append(scroll);
  if (study.curves.length) {
    const chart = document.createElement("div");
    chart.className = "chart";
    chart.append(lawChart(study, width));
    node.append(chart);
  }
  node.append(paragraph(study.fit ? fitText(study.fit) : `no law yet: ${study.fit_reason}`, "note"));
  return node;
}

export function showStudies(section, list, studies) {
  section.hidden = studies.length === 0;
  const width = Math.max(320, list.clientWidth);
  const key = JSON.stringify([width, studies]);
  if (key === shownKey) return;
  shownKey = key;
  list.replaceChildren(...studies.map((study) => article(study, width)));
}
