// A line chart in SVG: two series over one x axis, a forecast with its band, readout at the pointer. No dependencies.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 288, LEFT = 52, RIGHT = 12, TOP = 10, BOTTOM = 26;

export function element(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Round steps so that about `count` ticks cover [low, high].
export function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => value >= rough);
  const values = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) values.push(value);
  return values;
}

export function shortNumber(value) {
  const size = Math.abs(value);
  for (const [unit, suffix] of [[1e12, " T"], [1e9, " G"], [1e6, " M"], [1e3, " k"]]) {
    if (size >= unit) return `${+(value / unit).toPrecision(4)}${suffix}`;
  }
  return `${+value.toPrecision(4)}`;
}

// Draws {x, y} points; `series` maps a class name to its points. `describe` makes the readout of the nearest point.
export function drawChart(container, readout, series, xMax, describe) {
  const points = Object.values(series).flat().filter((point) => Number.isFinite(point.y));
  container.dataset.points = String(points.length);
  const width = Math.max(320, container.clientWidth);
  const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img",
    "aria-label": "loss over credited tokens" });
  if (points.length === 0) {
    svg.append(element("text", { x: width / 2, y: HEIGHT / 2, "text-anchor": "middle" }, "no outer step yet"));
    container.replaceChildren(svg);
    return;
  }
  const ys = points.flatMap((point) => [point.y, point.low ?? point.y, point.high ?? point.y]);
  const low = Math.min(...ys), high = Math.max(...ys), margin = (high - low) * 0.05 || 0.1;
  const yLow = low - margin, yHigh = high + margin;
  const toX = (x) => LEFT + (x / xMax) * (width - LEFT - RIGHT);
  const toY = (y) => TOP + ((yHigh - y) / (yHigh - yLow)) * (HEIGHT - TOP - BOTTOM);
  for (const value of ticks(yLow, yHigh, 6)) {
    svg.append(element("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: toY(value), y2: toY(value) }));
    svg.append(element("text", { x: LEFT - 6, y: toY(value) + 4, "text-anchor": "end" }, shortNumber(value)));
  }
  for (const value of ticks(0, xMax, 8)) {
    svg.append(element("text", { x: toX(value), y: HEIGHT - 8, "text-anchor": "middle" }, shortNumber(value)));
  }
  for (const [name, line] of Object.entries(series)) {
    const path = line.map((point, index) => `${index ? "L" : "M"}${toX(point.x).toFixed(1)} ${toY(point.y).toFixed(1)}`);
    svg.append(element("path", { class: name, d: path.join("") || "M0 0" }));
  }
  for (const point of series.heldout) svg.append(element("circle", { class: "dot", cx: toX(point.x), cy: toY(point.y), r: 2.5 }));
  for (const { x, y, low, high } of series.forecast) {
    svg.append(element("line", { class: "band", x1: toX(x), x2: toX(x), y1: toY(low), y2: toY(high) }));
    for (const end of [low, high]) svg.append(element("line", { class: "band", x1: toX(x) - 4, x2: toX(x) + 4, y1: toY(end), y2: toY(end) }));
    svg.append(element("circle", { class: "ahead", cx: toX(x), cy: toY(y), r: 3 }));
  }
  const cursor = element("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(cursor);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * width;
    const nearest = points.reduce((best, point) => (Math.abs(toX(point.x) - x) < Math.abs(toX(best.x) - x) ? point : best));
    cursor.setAttribute("x1", toX(nearest.x));
    cursor.setAttribute("x2", toX(nearest.x));
    cursor.setAttribute("visibility", "visible");
    readout.textContent = describe(nearest);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); readout.textContent = ""; });
  container.replaceChildren(svg);
}
