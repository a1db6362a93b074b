// Tables and the picture of requests.  Names come from others, so everything is set as text, never as HTML.
const SVG = "http://www.w3.org/2000/svg";
export const PARTS = ["queue", "load", "engine", "answer"];
const ROW = 22, BAR = 12, TOP = 20;

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") element.className = value;
    else if (name === "onclick") element.addEventListener("click", value);
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

function draw(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

export function seconds(s) {
  if (s === null || s === undefined) return "–";
  if (s < 0.1) return `${(1000 * s).toFixed(1)} ms`;
  return s < 10 ? `${s.toFixed(2)} s` : `${s.toFixed(1)} s`;
}

export function duration(s) {
  if (s === null || s === undefined) return "–";
  if (s < 90) return `${Math.round(s)} s`;
  const minutes = Math.round(s / 60);
  if (minutes < 60) return `${minutes} min`;
  return minutes % 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${minutes / 60} h`;
}

export function size(n) {
  if (n === null || n === undefined) return "–";
  return n < 1e6 ? `${Math.round(n / 1e3)} kB` : n < 999.5e6 ? `${Math.round(n / 1e6)} MB` : `${(n / 1e9).toFixed(1)} GB`;
}

export function clock(time) {
  return new Date(1000 * time).toLocaleTimeString([], { hour12: false });
}

export function table(heads, rows, empty) {
  if (!rows.length) return make("p", { class: "empty" }, empty);
  return make("table", {},
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", { scope: "col" }, head)))),
    make("tbody", {}, ...rows.map((row) => make("tr", {}, ...row))));
}

export const cell = (content, kind = "", title = "") => make("td", { class: kind, title: title || false }, content);

// Seconds of each part of a request that is over (explain.py, `parts`).
export function parts(r) {
  const rest = Math.max(0, r.total_s - r.queue_s - r.load_s - r.engine_s);
  return { queue: r.queue_s, load: r.load_s, engine: r.engine_s, answer: rest };
}

function ticks(most) {
  const step = [1, 2, 5, 10].map((n) => n * 10 ** Math.floor(Math.log10(most / 4))).find((n) => most / n <= 6);
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, i) => i * step);
}

// rows: requests, live ones (without `end`) first.  A bar is as long as the request took; live ones grow.
export function picture(box, rows, { full, choose, cancel }) {
  if (!rows.length) {
    box.replaceChildren(make("p", { class: "empty" }, "No request yet."));
    return;
  }
  const width = Math.max(box.clientWidth, 320), narrow = width < 700;
  const left = narrow ? 134 : 270, right = narrow ? 128 : 176, room = width - left - right;
  const most = Math.max(...rows.map((r) => r.total_s), 0.001);
  const height = TOP + rows.length * ROW + 4;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "list", "aria-label": "Requests, newest first" });
  if (!full) {
    for (const at of ticks(most)) {
      const x = left + (room * at) / most;
      svg.append(draw("line", { class: "axis", x1: x, x2: x, y1: TOP - 4, y2: height }));
      svg.append(draw("text", { class: "dim", x, y: 11, "text-anchor": "middle" }, at === 0 ? "0" : at < 1 ? `${+(1000 * at).toPrecision(3)} ms` : `${+at.toPrecision(3)} s`));
    }
  }
  rows.forEach((r, i) => svg.append(row(r, TOP + i * ROW, { width, narrow, left, right, room, most: full ? Math.max(r.total_s, 1e-9) : most, choose, cancel })));
  const kept = document.activeElement?.dataset?.ticket;
  box.replaceChildren(svg);
  if (kept) svg.querySelector(`[data-ticket="${CSS.escape(kept)}"]`)?.focus();
}

function row(r, y, { width, narrow, left, right, room, most, choose, cancel }) {
  const g = draw("g", { class: "row", tabindex: 0, role: "listitem", "data-ticket": r.ticket });
  const text = y + 15, fits = narrow ? 8 : 26;
  const model = r.model || "no model";
  g.append(draw("rect", { class: "back", x: 0, y, width, height: ROW, rx: 4 }));
  g.append(draw("text", { class: "dim", x: 4, y: text }, clock(r.time)));
  g.append(draw("text", { x: 68, y: text }, model.length > fits ? `${model.slice(0, fits - 1)}…` : model));
  let x = left, said = [];
  const pieces = r.end ? parts(r) : { [r.state]: r.total_s };
  for (const [name, took] of Object.entries(pieces)) {
    if (took <= 0) continue;
    const length = Math.max((room * took) / most, 0.75);
    g.append(draw("rect", { class: name, x, y: y + (ROW - BAR) / 2, width: length, height: BAR, rx: Math.min(2, length / 2) }));
    x += length;
    said.push(`${name} ${seconds(took)}`);
  }
  const end = width - right + 12;
  g.append(draw("text", { x: end, y: text }, seconds(r.total_s)));
  if (!r.end) {
    const press = draw("g", { class: "press", tabindex: 0, role: "button" });
    press.append(draw("text", { x: width - 4, y: text, "text-anchor": "end" }, "cancel"));
    press.addEventListener("click", (event) => { event.stopPropagation(); cancel(r); });
    press.addEventListener("keydown", (event) => { if (event.key === "Enter") { event.stopPropagation(); cancel(r); } });
    g.append(press);
  } else {
    const wrong = r.end !== "served" || r.status >= 400;
    g.append(draw("text", { class: wrong ? "wrong" : "dim", x: width - 4, y: text, "text-anchor": "end" }, wrong && !narrow && r.code && r.code !== r.end ? r.code.slice(0, 16) : r.end));
  }
  g.append(draw("title", {}, `${r.ticket}  ${r.path || ""}  ${model}\n${said.join(", ")}`));
  g.addEventListener("click", () => choose(r));
  g.addEventListener("keydown", (event) => { if (event.key === "Enter") choose(r); });
  return g;
}
