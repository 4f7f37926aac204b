// The page: says what will happen, starts the worker, draws what it measures, and posts it to the computer in order.

import { drawLatency, drawPace, number, range, time } from "./charts.js";

const MESSAGE = {
  used: ["This link has been used", "A measurement was started with it, here or on another device. What was measured so far is on the computer.", "Start the measurement again on the computer and open the new link."],
  wasm: ["This browser cannot run models", "It has no WebAssembly with SIMD, which both runtimes need.", "Open the link of a new measurement in Chrome, Edge, Firefox, or Safari 16.4 and later. In Lockdown Mode (iPhone), WebAssembly is off."],
  gone: ["The computer does not answer any more", "The measurement there has ended, or this device has left its network. Nothing is measured here any more; what was measured so far is on the computer.", "Check that both are on the same network, then start the measurement again."],
  ended: ["The computer has ended the measurement", "", "What was complete by then is on the computer. Start the measurement again there to repeat it."],
  broken: ["The measurement stopped", "", "What was measured so far is on the computer. Start the measurement again to repeat it."],
};
// What is said of a result, in words; devices/judgement.py and devices/browser.py raise these.
const FLAGS = {
  noisy: "the runs differ from each other by more than 10 %",
  drift: "it became faster or slower by more than 5 % while it was measured",
  averaged: "a run is too short for this browser's clock, so several were timed at a time; the slowest single runs do not show",
  "few-samples": "too few runs for a 90th percentile",
  contended: "other programs had the processor for a part of the time",
  throttled: "this device slowed itself down",
  slowed: "it became more than 10 % slower in the run under load",
  incomplete: "not all of its runs were made",
};
// Milliseconds: how long the computer may take for an answer, for one to outputs or to the end, and be silent at all
// attempts to reach it; the last is longer where this device knows that it has no network. ALIVE: this page's own silence.
const ANSWER_MS = 10000, LONG_ANSWER_MS = 60000, PATIENCE_MS = 4000, OFFLINE_MS = 30000, ALIVE_MS = 2000;
const IS_HERE = ["127.0.0.1", "[::1]"].includes(location.hostname);
const SECTIONS = ["loading", "start", "running", "failed", "done"];
const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((resume) => setTimeout(resume, ms));

let job, session = "", sequence = 0, queue = Promise.resolve(), over = false, worker, lock, hidden = 0, sentAt = 0, note = "";
const models = new Map(); // by id: { name, colour, runtime, medians, pace, start }

function show(name) {
  for (const section of SECTIONS) $(section).hidden = section !== name;
  $(`${name}-title`)?.focus();
}

function fail(kind, text) {
  if (over) return null;
  over = true;
  worker?.terminate();
  release();
  const [title, why, what] = MESSAGE[kind];
  $("failed-title").textContent = title;
  $("failed-text").textContent = text || why;
  $("failed-do").textContent = what;
  show("failed");
  return null;
}

let isWaiting = false;
function showWaiting(isIt) {
  isWaiting = isIt;
  $("running-title").textContent = document.visibilityState === "hidden" ? "Paused" : isIt ? "Waiting for the computer" : "Measuring";
  $("running-note").textContent = isIt ? "It does not answer. Trying again …" : note;
}

async function post(name, body) {
  const isBytes = body instanceof ArrayBuffer;
  const headers = {
    "Content-Type": isBytes ? "application/octet-stream" : "application/json",
    "X-Tacit-Session": session,
    "X-Tacit-Sequence": String(sequence),
  };
  sequence += 1;
  const sent = isBytes ? body : JSON.stringify(body);
  for (let attempt = 0, begunAt = Date.now(); ; attempt += 1) {
    try {
      sentAt = Date.now();
      const signal = AbortSignal.timeout?.(isBytes || name === "ended" ? LONG_ANSWER_MS : ANSWER_MS);
      const response = await fetch(name, { method: "POST", headers, body: sent, keepalive: name === "ended", signal });
      if (response.ok) {
        const answer = await response.json();
        showWaiting(false);
        return answer;
      }
      const reason = (await response.json().catch(() => ({}))).error || response.statusText;
      throw Object.assign(new Error(reason), { status: response.status });
    } catch (error) {
      // A phone's network comes and goes; the computer takes no report twice.
      const waited = Date.now() - begunAt, patience = navigator.onLine || IS_HERE ? PATIENCE_MS : OFFLINE_MS;
      if ((error.status && error.status !== 503) || waited > patience) throw error;
      showWaiting(true);
      await sleep(Math.min(1000, 300 * 2 ** attempt));
    }
  }
}

// One after the other, so that they arrive in order.
function tell(name, body) {
  queue = queue.then(async () => {
    if (over) return null;
    try {
      return await post(name, body);
    } catch (error) {
      if (error.status === 410) return fail("ended", sentence(error.message));
      if (!error.status) return fail("gone");
      const reason = `the computer refused a report (${error.status}): ${error.message}`;
      await post("ended", { reason: reason.slice(0, 300) }).catch(() => {});
      return fail("broken", `${reason}.`);
    }
  });
  return queue;
}

const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;

function hasWasm() {
  // A function that returns a vector: valid only where there is SIMD.
  const simd = [0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11];
  try {
    return typeof WebAssembly === "object" && WebAssembly.validate(new Uint8Array(simd));
  } catch {
    return false;
  }
}

async function battery() {
  try {
    const state = await navigator.getBattery();
    return { battery_percent: Math.round(100 * state.level), charging: state.charging ? 1 : 0 };
  } catch {
    return {};
  }
}

async function facts() {
  return {
    user_agent: navigator.userAgent,
    cores: navigator.hardwareConcurrency ?? null,
    memory_gib_at_least: navigator.deviceMemory ?? null,
    screen: `${screen.width}x${screen.height}@${devicePixelRatio}`,
    cross_origin_isolated: self.crossOriginIsolated ? 1 : 0,
    webassembly: hasWasm() ? 1 : 0,
    ...(await battery()),
  };
}

async function keepAwake() {
  try {
    lock = await navigator.wakeLock.request("screen");
    return true;
  } catch {
    return false;
  }
}

function release() {
  lock?.release?.().catch(() => {});
  lock = null;
}

const bytes = (count) => (count < 1e6 ? `${Math.max(1, Math.round(count / 1e3))} kB` : `${(count / 1e6).toFixed(1)} MB`);

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function problem(text) {
  $("problems").hidden = false;
  $("problems").append(element("li", text));
}

function describeJob() {
  const all = job.groups.flatMap((group) => group.models.map((model) => ({ ...model, runtime: group.runtime })));
  all.forEach((model, place) => models.set(model.id, { ...model, colour: `var(--s${place % 8})`, medians: [], pace: [], start: null }));
  const count = all.length;
  $("start-title").textContent = count === 1 ? "Measure a model on this device" : `Measure ${count} models on this device`;
  $("start-lead").textContent = "This browser will run them on real inputs and time every run.";
  for (const group of job.groups) {
    $("start-models").append(element("h2", group.runtime));
    const list = $("start-models").appendChild(element("ul"));
    for (const model of group.models) {
      const row = list.appendChild(element("li"));
      row.append(element("span", model.name, "name"), element("span", bytes(model.bytes), "what"));
    }
  }
  const minutes = job.expected_s / 60;
  $("start-time").textContent = minutes < 1.5 ? "It takes about a minute." : `It takes about ${Math.round(minutes)} minutes.`;
  const notices = [...job.notices];
  if (!self.crossOriginIsolated) notices.push("This page is not isolated here, so the clock is coarse: several runs are timed at a time.");
  $("start-notice").hidden = !notices.length;
  $("start-notice").textContent = notices.join(" ");
  $("foot").textContent = job.groups.map((group) => `${group.runtime} ${group.version}`).join(", ");
}

async function begin() {
  $("begin").disabled = true;
  try {
    // The same number with each attempt: an answer that was lost on the way is given again, to this page alone.
    const nonce = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    session = (await post("start", { nonce, facts: await facts() })).session;
  } catch (error) {
    fail(error.status === 409 ? "used" : error.status ? "broken" : "gone", error.status === 409 ? "" : error.message);
    return;
  }
  if (!hasWasm()) {
    await tell("ended", { reason: "this browser has no WebAssembly with SIMD" });
    fail("wasm");
    return;
  }
  show("running");
  $("results").hidden = false;
  const awake = await keepAwake();
  note = awake ? "The screen stays on. Keep this page in front." : "Keep the screen on and this page in front.";
  showWaiting(false);
  worker = new Worker("measure-worker.js");
  worker.onmessage = ({ data }) => receive(data);
  worker.onerror = (event) => stop(event.message || "the worker could not be started");
  worker.postMessage({ job, session });
  // So that each learns soon that the other is gone.
  setInterval(() => { if (!over && Date.now() - sentAt >= ALIVE_MS) tell("alive", {}); }, ALIVE_MS / 2);
}

async function stop(reason) {
  await tell("ended", { reason: String(reason).slice(0, 300) });
  fail("broken", `${reason}`);
}

async function receive(data) {
  if (over) return;
  if (data.step) progress(data.step, data.share);
  if (data.block) {
    const model = models.get(data.block.model);
    model.start ??= data.block.at;
    model.medians.push({ s: (data.block.at - model.start) / 1000, ms: data.block.ms });
    schedule();
  }
  if (data.pace) {
    models.get(data.pace.model).pace.push(data.pace);
    schedule();
  }
  if (data.moment) tell("moment", { ...data.moment, hidden, ...(await battery()) });
  if (data.broken) await stop(data.broken);
  if (data.report === "failed") problem(`${models.get(data.body.model).name}: not measured. ${data.body.reason}`);
  if (data.report === "ended") finish(await tell("ended", data.body));
  else if (data.report) tell(data.report, data.body);
}

function progress(text, share) {
  $("running-step").textContent = text;
  $("running-progress").value = Math.max($("running-progress").value, Math.round(100 * share));
}

let isDue = false;
function schedule() {
  if (isDue) return;
  isDue = true;
  setTimeout(() => {
    isDue = false;
    draw();
  }, 500);
}

function draw() {
  const shown = [...models.values()].filter((model) => model.medians.length);
  $("latency-card").hidden = $("pace-card").hidden = !shown.length;
  if (!shown.length) return;
  drawLatency($("latency"), shown);
  const isSustained = shown.some((model) => model.pace.length > 1);
  const isLong = job.sustained_s >= 180;
  if (isSustained) $("pace-title").textContent = "Pace under load";
  const series = shown.map((model) => ({ ...model, points: isSustained ? model.pace.map(({ minutes, ms }) => ({ x: isLong ? minutes : 60 * minutes, ms })) : model.medians.map(({ s, ms }) => ({ x: s, ms })) }));
  drawPace($("pace"), series.filter((one) => one.points.length > 1), isSustained && isLong ? "min" : "s");
}

function cell(text, small) {
  const made = element("td", text);
  made.setAttribute("role", "cell");
  if (small) made.append(element("small", small));
  return made;
}

// Only all of them are 100 %.
const percent = (share) => `${share < 1 ? Math.min(99.9, Number((100 * share).toFixed(1))) : 100} %`;
const shownTime = (us) => (us === null ? "too few runs" : time(us));

// What share the answers' column holds: of right labels, or of answers like the original model's.
const checkOf = (results) => Object.values(results).find(({ accuracy }) => accuracy)?.accuracy.kind;

function table(group, results) {
  const rows = group.models.filter((model) => results[model.id]);
  if (!rows.length) return null;
  const card = element("div", undefined, "card"), made = element("table"), head = element("tr");
  made.append(element("caption", group.runtime));
  for (const title of ["Model", "Median", "p90", "Ratio", ...(job.check ? [checkOf(results) === "top1" ? "Accuracy" : "Same answer"] : [])]) {
    const column = element("th", title);
    column.scope = "col";
    column.setAttribute("role", "columnheader"); // a style of rows takes roles away
    head.append(column);
  }
  const top = element("thead"), body = element("tbody");
  made.setAttribute("role", "table");
  if (job.check) made.className = "checked";
  head.setAttribute("role", "row");
  for (const part of [top, body]) part.setAttribute("role", "rowgroup");
  top.append(head);
  for (const model of rows) {
    const found = results[model.id], row = element("tr"), name = element("th");
    const swatch = element("span", undefined, "swatch");
    swatch.style.background = models.get(model.id).colour;
    name.scope = "row";
    name.setAttribute("role", "rowheader");
    row.setAttribute("role", "row");
    name.append(swatch, model.name);
    for (const flag of found.flags) {
      const badge = element("span", flag, "flag");
      badge.title = FLAGS[flag] ?? "";
      name.append(" ", badge);
    }
    row.append(name, cell(shownTime(found.p50_us), found.ci_us && range(found.ci_us)), cell(shownTime(found.p90_us)));
    const ratio = found.relative;
    row.append(ratio ? cell(`${number(ratio.estimate)}×`, `${number(ratio.low)}–${number(ratio.high)}`) : cell(found.is_first ? "1" : "–", found.is_first ? "reference" : "too few runs"));
    if (job.check) row.append(found.accuracy ? cell(percent(found.accuracy.share), `of ${found.accuracy.n}`) : cell("–"));
    body.append(row);
  }
  made.append(top, body);
  card.append(made);
  return card;
}

// What the marks beside the names mean.
function explain(flags) {
  if (!flags.size) return;
  const list = $("done-tables").appendChild(element("ul", undefined, "flags"));
  for (const flag of flags) {
    const row = list.appendChild(element("li"));
    row.append(element("span", flag, "flag"), ` ${FLAGS[flag] ?? "is explained in the report on the computer"}`);
  }
}

function finish(answer) {
  if (over || !answer) return;
  over = true;
  worker.terminate();
  release();
  const found = answer.artifacts, count = Object.keys(found).length;
  for (const [id, { p50_us }] of Object.entries(found)) models.get(id).p50Us = p50_us;
  $("latency-note").textContent = "A dot is the median of a few runs in a row, the line the median of all runs, as in the table.";
  draw();
  show("done");
  if (!count) {
    $("done-title").textContent = "No model could be measured";
    $("done-lead").textContent = "Why is said below, and on the computer.";
  }
  for (const group of job.groups) {
    const made = table(group, found);
    if (made) $("done-tables").append(made);
  }
  if (job.groups.some((group) => group.models.length > 1)) {
    $("done-tables").append(element("p", "Ratio: time of a run against the first model of the same runtime, with its 95 % interval; below 1 is faster.", "quiet"));
  }
  if (checkOf(found)) $("done-tables").append(element("p", checkOf(found) === "top1" ? "Accuracy: the share of inputs with the right answer." : "Same answer: the share of inputs on which it answers as the original model does.", "quiet"));
  explain(new Set(Object.values(found).flatMap(({ flags }) => flags)));
  if (hidden) problem(`The page was left ${hidden === 1 ? "once" : `${hidden} times`} while it measured; it waited for your return.`);
}

document.addEventListener("visibilitychange", () => {
  if (!worker || over) return;
  const paused = document.visibilityState === "hidden";
  if (paused) hidden += 1;
  else keepAwake();
  worker.postMessage({ paused });
  showWaiting(isWaiting);
});

addEventListener("pagehide", () => {
  if (!session || over) return;
  over = true;
  // Out of turn: what waits in the queue will not be sent any more.
  fetch("closed", { method: "POST", keepalive: true, headers: { "Content-Type": "application/json", "X-Tacit-Session": session }, body: "{}" });
});

async function main() {
  $("results").hidden = true;
  try {
    const response = await fetch("job");
    if (response.status === 409) return fail("used");
    if (!response.ok) throw new Error(String(response.status));
    job = await response.json();
  } catch {
    return fail("gone");
  }
  describeJob();
  draw();
  if (!hasWasm()) return begin(); // the computer is told why nothing will come
  $("begin").addEventListener("click", begin);
  show("start");
}

main();
