// The dashboard: looks at /api/status every few seconds while it is seen, and follows /api/events.
import { cell, clock, duration, make, picture, seconds, size, table } from "./draw.js";

const KEY = "llm-daemon-key", SHOWN = 30, KEPT = 200, LOOK = 3000, STORY = 14;
const $ = (id) => document.getElementById(id);
const records = new Map();      // ended requests by ticket, oldest first
let live = new Map();           // requests without an end; `since` is the page's own clock
let story = [], status = null, chosen = null, lastId = null, looking = null, drawing = false;
let skew = 0;                   // seconds that the daemon's wall clock is ahead of ours

// The key -------------------------------------------------------------------------------------------------------
function takeKey() {
  if (!location.hash.startsWith("#token=")) return false;
  sessionStorage.setItem(KEY, decodeURIComponent(location.hash.slice(7)));
  history.replaceState(null, "", location.pathname);  // it must not stay in the address, nor in the history
  return true;
}

let asking = null;
function askKey() {
  asking ??= new Promise((done) => {
    $("ask").showModal();
    $("ask-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, $("key").value.trim());
      $("key").value = "";
      $("ask").close();
      asking = null;
      done();
    };
  });
  return asking;
}
$("ask").addEventListener("cancel", (event) => event.preventDefault());

async function call(path, { body, headers = {}, ...rest } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await fetch(path, {
      cache: "no-store", ...rest, method: body === undefined ? "GET" : "POST",
      body: body === undefined ? undefined : JSON.stringify(body),
      headers: { ...headers, ...(key ? { Authorization: `Bearer ${key}` } : {}), ...(body === undefined ? {} : { "Content-Type": "application/json" }) },
    });
    if (response.status !== 401) return response;
    await askKey();
  }
}

async function json(path, options) {
  const response = await call(path, options);
  const answer = await response.json();
  if (!response.ok) throw Object.assign(new Error(answer.error?.message ?? response.statusText), { code: answer.error?.code });
  return answer;
}

// What is drawn -------------------------------------------------------------------------------------------------
function show() {  // many events, one picture
  if (drawing || document.hidden) return;
  drawing = true;
  requestAnimationFrame(() => { drawing = false; paint(); });
}

function paint() {
  const now = performance.now() / 1000;
  const running = [...live.values()].map((r) => ({ ...r, total_s: now - r.since, time: Date.now() / 1000 + skew - (now - r.since) }));
  const ended = [...records.values()].sort((a, b) => b.time + b.total_s - a.time - a.total_s);
  picture($("requests"), [...running.reverse(), ...ended].slice(0, SHOWN), { full: $("full").checked, choose, cancel });
  const served = ended.slice(0, 100).filter((r) => r.end === "served").map((r) => r.total_s).sort((a, b) => a - b);
  $("tile-half").textContent = served.length ? seconds(served[Math.ceil(served.length / 2) - 1]) : "–";
  $("tile-running").textContent = running.filter((r) => r.state === "running").length;
  $("tile-waiting").textContent = running.filter((r) => r.state === "waiting").length;
  const one = chosen && (records.get(chosen) ?? running.find((r) => r.ticket === chosen));
  $("one").hidden = !one;
  if (one) $("one").replaceChildren(...details(one));
  $("story").replaceChildren(...(story.length ? story.slice(-STORY).reverse().map((e) => make("li", { class: ["died", "hung", "failed"].includes(e.why) ? "bad" : "" }, make("time", {}, clock(e.time)), e.text))
    : [make("li", { class: "quiet" }, "Nothing yet.")]));
}

const TIMES = ["queue_s", "load_s", "engine_s", "first_token_s", "total_s"];
function details(r) {
  const skip = new Set(["kind", "time", "since", "state"]);
  return Object.entries(r).filter(([name, value]) => !skip.has(name) && value !== null && value !== "").map(([name, value]) =>
    make("div", {}, make("dt", {}, name.replace(/_s$/, "").replaceAll("_", " ")), make("dd", {}, TIMES.includes(name) ? seconds(value) : String(value))));
}

function choose(r) {
  chosen = chosen === r.ticket ? null : r.ticket;
  show();
}

function paintStatus() {
  const d = status.daemon;
  const leaving = d.exit_in === null ? "" : ` · nobody holds it: it ends in ${duration(d.exit_in)}`;
  $("daemon").textContent = `${d.version} · pid ${d.pid} · up ${duration(d.uptime)} · ${d.base_url}${leaving}`;
  const loaded = status.instances.filter((it) => it.state === "ready" || it.state === "draining");
  $("tile-models").textContent = loaded.length;
  $("tile-leases").textContent = d.leases;
  $("tile-memory").textContent = size(status.instances.reduce((sum, it) => sum + (it.memory_bytes ?? 0), d.memory_bytes ?? 0));
  $("models").replaceChildren(table(["Model", "State", "Engine", "Memory", "Context", "Slots", "Leases", "Closes", ""],
    status.instances.map(modelRow), "No model is loaded. The first request loads one."));
  $("leases").replaceChildren(table(["Pid", "Program", "Holds", "Since"], status.leases.map((l) => [
    cell(l.pid || "–"), cell(l.program || l.kind, "long", l.program), cell(l.models.join(", ") || "the endpoint"), cell(duration(l.since)),
  ]), "Nobody holds a lease."));
}

function modelRow(it) {
  const p = it.progress, percent = p?.total ? ` ${Math.floor((100 * p.done) / p.total)} %` : "";
  const slots = make("span", { class: "slots", "aria-hidden": true },
    ...Array.from({ length: Math.min(it.slots, 16) }, (_, i) => make("i", { class: i < it.running ? "busy" : "" })),
    ...Array.from({ length: Math.min(it.waiting, 16) }, () => make("i", { class: "more" })));
  const lanes = [[it.waiting_interactive, "interactive"], [it.waiting - it.waiting_interactive, "regular"]];
  const waits = it.waiting ? `, ${lanes.filter(([n]) => n).map(([n, lane]) => `${n} ${lane}`).join(", ")} waiting` : "";
  const still = it.stalled_seconds >= 5 ? `silent for ${duration(it.stalled_seconds)}` : "";
  const error = it.error?.message ?? still;
  return [
    make("td", { class: "name" }, it.model, error ? make("span", { class: "note" }, error) : null),
    cell(make("span", { class: `mark ${it.state}` }, p ? `${p.phase ?? "loading"}${percent}` : it.state)),
    cell(it.engine || "–", "", it.engine_version), cell(size(it.memory_bytes)), cell(it.context ?? "–"),
    make("td", {}, it.slots ? slots : null, it.slots || it.waiting ? `${it.running}/${it.slots}${waits}` : "–"), cell(it.leases.length), cell(it.closes_in === null ? "–" : `in ${duration(it.closes_in)}`),
    make("td", { class: "act" }, it.pid ? make("button", { type: "button", onclick: (event) => unload(it, event.target) }, "Unload") : null),
  ];
}

function connected(error) {
  $("state").hidden = !error;
  if (error) $("state").textContent = "the daemon does not answer: it may have ended, because nobody needs it";
}

// What is done --------------------------------------------------------------------------------------------------
async function unload(it, button) {
  button.disabled = true;
  try {
    await json("/api/unload", { body: { model: it.model, force: false } });
  } catch (error) {
    if (error.code === "in_use" && confirm(`${error.message}.\n\nClose it anyway?`)) {
      await json("/api/unload", { body: { model: it.model, force: true } }).catch((e) => alert(e.message));
    } else if (error.code !== "in_use") alert(error.message);
  }
  look();
}

function cancel(r) {
  json(`/api/cancel/${encodeURIComponent(r.ticket)}`, { body: {} }).catch((e) => { if (e.code !== "unknown_ticket") alert(e.message); });
}

$("load").addEventListener("submit", async (event) => {
  event.preventDefault();
  const model = $("load-name").value.trim();
  if (!model) return;
  $("load-says").textContent = `loading ${model} …`;
  look();
  try {
    const told = await json("/api/load", { body: { model } });
    $("load-says").textContent = `${told.model} is ready on ${told.engine}`;
    $("load-name").value = "";
  } catch (error) {
    $("load-says").textContent = error.message;
  }
  look();
});
$("full").addEventListener("change", show);
addEventListener("resize", show);
addEventListener("hashchange", () => takeKey() && location.reload());

// What is heard -------------------------------------------------------------------------------------------------
async function look() {
  clearTimeout(looking);
  if (!document.hidden) {
    try {
      status = await json("/api/status");
      connected(null);
      paintStatus();
    } catch (error) {
      connected(error);
    }
  }
  clearTimeout(looking);
  looking = setTimeout(look, LOOK);
}
document.addEventListener("visibilitychange", () => { if (!document.hidden) { look(); show(); } });

let soon = null;
function lookSoon() {
  soon ??= setTimeout(() => { soon = null; look(); }, 250);
}

function heard(kind, what) {
  skew = what.time && kind !== "ticket" ? what.time - Date.now() / 1000 : skew;
  if (kind === "ticket") {
    live.delete(what.ticket);
    keep(what);
  } else if (kind === "arrived") {
    live.set(what.ticket, { ...what, state: "waiting", since: performance.now() / 1000 });
  } else if (kind === "running") {
    const one = live.get(what.ticket);
    if (one) Object.assign(one, { state: "running", instance: what.instance });
  } else if (kind === "lost") {
    catchUp();
  } else if (what.text) {
    story.push(what);
    if (story.length > KEPT) story.shift();
    lookSoon();
  } else lookSoon();
  show();
}

function keep(record) {
  records.set(record.ticket, record);
  if (records.size > KEPT) records.delete(records.keys().next().value);
}

async function catchUp() {  // what was before we listened; what came meanwhile is newer
  const began = performance.now() / 1000;
  const [told, now] = await Promise.all([json(`/api/explain?limit=${KEPT}`), json("/api/tickets")]);
  for (const r of told.recent.reverse()) if (!records.has(r.ticket)) keep(r);
  story = [...told.events.reverse().filter((e) => !story.length || e.time < story[0].time), ...story];
  const at = performance.now() / 1000;
  const newer = [...live].filter(([, r]) => r.since >= began);  // heard of while the answer was on its way
  live = new Map([...now.tickets.filter((r) => !records.has(r.ticket)).map((r) => [r.ticket, { ...r, since: at - r.total_s }]), ...newer]);
  show();
}

async function follow() {  // EventSource cannot send a key
  let pause = 500;
  for (;;) {
    try {
      const response = await call("/api/events", { headers: lastId ? { "Last-Event-ID": lastId } : {} });
      if (!response.ok) throw new Error(response.statusText);
      pause = 500;
      catchUp().catch(connected);
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      for (let rest = "", part; !(part = await reader.read()).done;) {
        const frames = (rest + part.value).split("\n\n");
        rest = frames.pop();
        for (const frame of frames) {
          const fields = Object.fromEntries(frame.split("\n").map((line) => line.split(/: (.*)/s)));
          if (!fields.data) continue;
          lastId = fields.id;
          heard(fields.event, JSON.parse(fields.data));
        }
      }
    } catch (error) {
      connected(error);
    }
    await new Promise((done) => setTimeout(done, pause));
    pause = Math.min(2 * pause, 10000);
  }
}

takeKey();
look();
follow();
setInterval(() => { if (live.size) show(); }, 250);  // live bars grow
call("/v1/models").then((r) => r.ok && r.json()).then((models) => {
  if (models) $("names").append(...models.data.map((m) => make("option", { value: m.id })));
}).catch(() => {});
