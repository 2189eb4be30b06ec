// Asks the JSON API once a second and shows the answers. Text from peers only ever becomes textContent, never markup.

import { drawChart, shortNumber } from "./chart.js";
import { showStudies } from "./studies.js";

const POLL_MS = 1000;
const MAX_SHOWN_EVENTS = 300;
const byId = (id) => document.getElementById(id);
const select = byId("run-select");
let shownSeriesKey = "";
let shownRunId = "";
let newestEventId = -1;
let isPolling = false;
let isPollingStudies = false;
let studiesTrouble = "";

async function ask(path) {
  const answer = await fetch(path, { cache: "no-store" });
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

function put(id, text) {
  const node = byId(id);
  if (node.textContent !== text) node.textContent = text;
}

function cell(row, text, className) {
  const node = row.insertCell();
  node.textContent = text;
  if (className) node.className = className;
  return node;
}

function stateCell(row, state) {
  const span = document.createElement("span");
  span.className = "state";
  span.dataset.state = state;
  span.textContent = state;
  row.insertCell().append(span);
}

function durationText(seconds) {
  if (!(seconds > 0)) return "-";
  const whole = Math.round(seconds), hours = Math.floor(whole / 3600), minutes = Math.floor((whole % 3600) / 60);
  return hours ? `${hours} h ${minutes} min` : minutes ? `${minutes} min ${whole % 60} s` : `${whole} s`;
}

function showRuns(runs) {
  const ids = runs.map((run) => run.run_id);
  if (ids.join() !== [...select.options].map((option) => option.value).join()) {
    select.replaceChildren(...runs.map((run) => new Option(`${run.run_id} (${run.state})`, run.run_id)));
  }
  const wanted = decodeURIComponent(location.hash.slice(1));
  const runId = ids.includes(wanted) ? wanted : ids[0] ?? "";
  select.value = runId;
  return runId;
}

function showStatus(status) {
  byId("run-state").dataset.state = status.state;
  put("run-state", status.state);
  const recovering = status.coordinator_state === "RECOVERING" ? ` - coordinator: ${status.coordinator_state_reason}` : "";
  put("run-reason", status.state_reason + recovering);
  put("credited", status.credited_tokens.toLocaleString("en"));
  put("budget", status.budget_tokens.toLocaleString("en"));
  byId("budget-progress").value = status.budget_tokens ? status.credited_tokens / status.budget_tokens : 0;
  put("budget-note", `leased ${shortNumber(status.active_tokens)}, expired ${shortNumber(status.expired_tokens)}, ` +
    `uncredited ${shortNumber(status.uncredited_trained_tokens)}, rolled back ${shortNumber(status.rolled_back_tokens)}`);
  put("goodput", shortNumber(status.goodput_tokens_per_second));
  put("eta", status.eta_seconds > 0 ? `${durationText(status.eta_seconds)} to go` : "");
  put("loss", status.train_loss_nats > 0 ? status.train_loss_nats.toFixed(3) : "-");
  const last = status.last_evaluation;
  put("heldout", last ? last.bits_per_byte.toFixed(3) : "-");
  put("heldout-note", last ? `bits per byte (${last.loss_nats.toFixed(3)} nats per token) at step ${last.outer_step}` : "bits per byte");
  const said = status.forecast.forecast;
  put("forecast", said ? said.loss_nats.toFixed(3) : "-");
  put("forecast-note", said ? `nats held-out at ${shortNumber(said.final_tokens)} tokens, ${said.low_nats.toFixed(3)} to ${said.high_nats.toFixed(3)}; ` +
    `made at ${shortNumber(status.forecast.credited_tokens)} tokens` : status.forecast.reason);
  put("best-size", said ? shortNumber(said.n_opt) : "-");
  put("best-size-note", said ? `parameters; the present ones use ${Math.round(100 * said.efficiency_ratio)} % of the compute` +
    (said.is_restart_better ? ": restart advised" : "") : "");
  byId("advice").hidden = !said;
  put("advice", said ? `Best size: ${said.restart_reason}. Cooldown ${said.is_cooldown_due ? "due" : "not due"}: ${said.cooldown_reason}. ` +
    `Forecast: ${said.reason}.` : "");
  put("outer-step", String(status.outer_step));
  put("incarnation", `incarnation ${status.incarnation}, ${status.num_rollbacks} rollbacks, directive ${status.directive_number}`);
  put("num-peers", String(status.num_live_peers));
  put("num-voters", `${status.num_voters} with a vote, ${status.num_peers_seen} seen; states ${status.state_digests_equal ? "equal" : "DIFFER"}`);
  put("num-leases", String(status.leases_by_state.ACTIVE ?? 0));
  put("lease-note", `active; ${status.leases_by_state.EXPIRED ?? 0} expired, ${status.leases_by_state.COMMITTED ?? 0} credited`);
  document.title = `${status.state} - ${status.run_id} - Muster`;
}

const PHASES = ["form", "exchange", "reduce", "agree", "apply"];

/* The last committed attempt as the peer claims it: its time, split into phases by the tooltip; bandwidth; lost attempts. */
function showRound(row, claims) {
  const seconds = PHASES.map((phase) => claims[`${phase}_seconds`]);
  const total = seconds.reduce((sum, value) => sum + value, 0);
  cell(row, total > 0 ? total.toFixed(2) : "-", "number").title =
    PHASES.map((phase, index) => `${phase} ${seconds[index].toFixed(3)} s`).join(", ");
  cell(row, total > 0 ? (claims.averaging_bytes_per_second / 1e6).toFixed(1) : "-", "number").title =
    `${shortNumber(claims.sent_bytes)}B sent, ${shortNumber(claims.received_bytes)}B received since its start`;
  cell(row, String(claims.num_attempts_discarded), "number").title = claims.discard_reason;
}

function showPeers(peers, nowSeconds) {
  const rows = peers.map((peer) => {
    const row = document.createElement("tr");
    if (!peer.is_live) row.className = "gone";
    row.dataset.peer = peer.peer_id;
    cell(row, peer.name || peer.peer_id.slice(0, 8)).title = peer.peer_id;
    stateCell(row, peer.is_live ? peer.claims.state || "-" : "-");
    stateCell(row, peer.state);
    cell(row, String(peer.claims.outer_step), "number");
    cell(row, shortNumber(peer.claims.tokens_per_second), "number");
    showRound(row, peer.claims);
    cell(row, peer.credited_tokens.toLocaleString("en"), "number");
    cell(row, String(peer.active_leases), "number");
    cell(row, `${Math.max(0, Math.round(nowSeconds - peer.last_heartbeat_unix_seconds))} s ago`, "number");
    cell(row, peer.is_live ? peer.claims.state_reason || peer.state_reason : peer.state_reason);
    return row;
  });
  byId("peers").tBodies[0].replaceChildren(...rows);
}

function showSeries(series, status) {
  const train = series.steps.map((step) => ({ x: step.credited_tokens, y: step.loss_nats, step: step.outer_step, name: "training" }));
  const heldout = series.evaluations.map((point) => ({ x: point.schedule_tokens, y: point.loss_nats, step: point.outer_step, name: "held-out" }));
  const said = status.forecast.forecast;
  const forecast = said ? [{ x: said.final_tokens, y: said.loss_nats, low: said.low_nats, high: said.high_nats, name: "forecast" }] : [];
  byId("forecast-key").hidden = !said;
  const xMax = Math.max(status.budget_tokens, 1, ...[...train, ...heldout, ...forecast].map((point) => point.x));
  drawChart(byId("loss-chart"), byId("loss-readout"), { train, heldout, forecast }, xMax, (point) => point.name === "forecast" ?
    `forecast: ${point.y.toFixed(4)} nats (${point.low.toFixed(4)} to ${point.high.toFixed(4)}) at ${shortNumber(point.x)} tokens` :
    `${point.name}: ${point.y.toFixed(4)} nats at ${shortNumber(point.x)} tokens, step ${point.step}`);
}

function showEvents(events) {
  for (const event of events) {
    if (event.event_id <= newestEventId) continue;
    newestEventId = event.event_id;
    const item = document.createElement("li");
    const time = document.createElement("time");
    time.textContent = new Date(event.unix_seconds * 1000).toLocaleTimeString();
    const kind = document.createElement("span");
    kind.className = "kind";
    kind.textContent = event.kind;
    item.append(time, kind, event.text);
    byId("events").prepend(item);
  }
  while (byId("events").children.length > MAX_SHOWN_EVENTS) byId("events").lastElementChild.remove();
}

// Apart from the rest, which neither waits for a fit nor stops when one cannot be shown.
async function pollStudies(runId, base) {
  if (isPollingStudies) return;
  isPollingStudies = true;
  try {
    const { studies } = await ask(`${base}/studies`);
    if (runId === shownRunId) showStudies(byId("studies"), byId("study-list"), studies);
    studiesTrouble = "";
  } catch (error) {
    studiesTrouble = `studies cannot be shown (${error.message})`;
  } finally {
    isPollingStudies = false;
  }
}

async function poll() {
  if (isPolling || document.hidden) return;
  isPolling = true;
  try {
    const runId = showRuns((await ask("/api/v1/runs")).runs);
    if (runId === "") {
      put("connection", "no run yet");
      return;
    }
    if (runId !== shownRunId) {
      shownRunId = runId;
      shownSeriesKey = "";
      newestEventId = -1;
      byId("events").replaceChildren();
    }
    const base = `/api/v1/runs/${encodeURIComponent(runId)}`;
    pollStudies(runId, base);
    const [status, peers, events] = await Promise.all([
      ask(base), ask(`${base}/peers`), ask(`${base}/events?after=${newestEventId}`)]);
    showStatus(status);
    showPeers(peers.peers, status.now_unix_seconds);
    showEvents(events.events);
    const seriesKey = [status.incarnation, status.outer_step, status.last_evaluation?.unix_seconds,
      status.forecast.make_unix_seconds].join();
    if (seriesKey !== shownSeriesKey) {
      showSeries(await ask(`${base}/series`), status);
      shownSeriesKey = seriesKey;
    }
    put("connection", studiesTrouble);
  } catch (error) {
    put("connection", `no answer from the coordinator (${error.message})`);
  } finally {
    isPolling = false;
  }
}

select.addEventListener("change", () => { location.hash = encodeURIComponent(select.value); });
addEventListener("hashchange", poll);
addEventListener("resize", () => { shownSeriesKey = ""; });
document.addEventListener("visibilitychange", poll);
setInterval(poll, POLL_MS);
poll();
