// The measurement, away from the page: loads models, times them in turn, and hands on what is to be reported.
// A classic worker: LiteRT.js loads its WebAssembly with importScripts, which module workers lack.

const TYPES = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array };
const BLOCK_MS = 20, REPORT_MS = 700, TICKS = 100, MOST_SAMPLES = 100000, BUCKET_MS = 1000;

let paused = false, job, session;

onmessage = ({ data }) => {
  if ("paused" in data) paused = data.paused;
  if (data.job) {
    ({ job, session } = data);
    main().then(() => postMessage({ report: "ended", body: { reason: null } }), (error) => postMessage({ broken: said(error) }));
  }
};

const now = () => performance.now();
const said = (error) => String((error && error.message) || error).slice(0, 300);
const nanoseconds = (milliseconds) => Math.max(1, Math.round(milliseconds * 1e6));
const report = (kind, body) => postMessage({ report: kind, body });

// How far the whole is, by the seconds that its parts are expected to take; the part under way has a share of its own.
let expectedS = 1, doneS = 0;
const step = (text, share = 0, seconds = 0) => postMessage({ step: text, share: Math.min(1, (doneS + share * seconds) / expectedS) });
const LOAD_S = 1, CHECK_S = 1, WARM_S = 1;
const timedS = (models) => models.length * 1.5 * job.plan.min_s;

function expect() {
  const models = job.groups.flatMap((group) => group.models);
  const each = LOAD_S + WARM_S + (job.check ? CHECK_S : 0) + (job.sustained_s ?? 0);
  expectedS = models.length * each + timedS(models);
}


// Lets messages in between blocks, and waits while the page is hidden, where browsers slow scripts down.
async function breathe() {
  do await new Promise((resume) => setTimeout(resume, paused ? 200 : 0));
  while (paused);
}

async function content(name) {
  const response = await fetch(name, { headers: { "X-Tacit-Session": session } });
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  return response.arrayBuffer();
}

// The least step of the clock: 5 us in an isolated page, 100 us and more in others.
function tickMs() {
  const steps = [], end = now() + 30;
  for (let last = now(); last < end && steps.length < 200; ) {
    const next = now();
    if (next > last) steps.push(next - last);
    last = next;
  }
  steps.sort((a, b) => a - b);
  return steps.length ? Math.max(0.001, steps[Math.floor(steps.length / 2)]) : 1;
}

function median(values) {
  const sorted = Float64Array.from(values).sort();
  return sorted.length ? sorted[Math.floor((sorted.length - 1) / 2)] : NaN;
}

// One list of { type, shape, values } for each example.
async function examples(described, count) {
  const arrays = await Promise.all(described.map(async (input) => new TYPES[input.type](await content(input.file))));
  return Array.from({ length: count }, (_, index) =>
    described.map(({ type, shape }, place) => {
      const size = shape.reduce((product, side) => product * side, 1);
      return { type, shape: [1, ...shape], values: arrays[place].slice(index * size, (index + 1) * size) };
    }),
  );
}

async function load(model, openModel, loadRuntime) {
  step(`Loading ${model.name}`);
  const bytes = await content(`model/${model.id}`);
  await loadRuntime(model.kind);
  await breathe();
  const started = now();
  model.infer = await openModel(model.kind, bytes);
  const loadedMs = now() - started;
  model.inputs = await examples(job.inputs[model.layout], job.n);
  await model.infer(model.inputs[0]);
  report("loaded", { model: model.id, load_ns: nanoseconds(loadedMs) });
}

// What the first output is for the inputs that the computer knows answers to; as many as there is time for.
async function check(model) {
  if (!job.check) return;
  step(`Checking what ${model.name} answers`);
  const inputs = await examples(job.check.inputs[model.layout], job.check.n);
  const answers = [], end = now() + job.check.max_s * 1000;
  for (const input of inputs) {
    answers.push((await model.infer(input))[0]);
    if (now() > end) break;
    if (answers.length % 16 === 0) await breathe();
  }
  const head = JSON.stringify([{ type: answers[0].type, shape: [...answers[0].shape] }]);
  const blob = new Blob([`${head}\n`, ...answers.map(({ values }) => values.slice())]);
  postMessage({ report: `outputs/${model.id}`, body: await blob.arrayBuffer() });
}

async function warmUp(model) {
  const { warmup_s, max_warmup_s, min_warmup_runs } = job.plan, started = now(), times = [];
  let last = started;
  // The median of the last quarter against the one before tells whether it has settled.
  const slope = () => {
    const quarter = Math.floor(times.length / 4);
    if (quarter < 3) return null;
    return median(times.slice(-quarter)) / median(times.slice(-2 * quarter, -quarter)) - 1;
  };
  for (;;) {
    const before = now();
    await model.infer(model.inputs[times.length % job.n]);
    times.push(now() - before);
    const spent = now() - started;
    if (now() - last > 50) { await breathe(); last = now(); }
    if (spent > max_warmup_s * 1000) break;
    if (spent > warmup_s * 1000 && times.length >= min_warmup_runs && !(Math.abs(slope() ?? 0) > 0.02)) break;
  }
  const spent = now() - started, found = slope();
  model.warmup = { runs: times.length, spent_ns: nanoseconds(spent), slope: Number.isFinite(found) ? found : null };
  // With its share of promises and copies: many runs by the clock, since single ones may be shorter than its step.
  const typical = Math.max(spent / times.length / 4, median(times.slice(-Math.ceil(times.length / 2))), 1e-4);
  const enough = Math.max((TICKS * job.tick_ms) / typical, (job.plan.min_s * 1000) / typical / MOST_SAMPLES);
  model.runsPerSample = enough > 1 ? Math.min(100000, Math.ceil(enough)) : 1;
  model.blockSamples = Math.max(1, Math.min(1000, Math.round(BLOCK_MS / (typical * model.runsPerSample))));
}

async function sample(model) {
  const { infer, inputs, runsPerSample } = model, count = inputs.length;
  let place = model.next ?? 0;
  const before = now();
  for (let run = 0; run < runsPerSample; run += 1) {
    await infer(inputs[place]);
    place = place + 1 === count ? 0 : place + 1;
  }
  const spent = now() - before;
  model.next = place;
  return spent / runsPerSample;
}

async function block(model) {
  await model.infer(model.inputs[0]); // not timed: caches hold the model that ran before
  const times = [];
  for (let index = 0; index < model.blockSamples; index += 1) times.push(await sample(model));
  model.fresh.push(...times);
  model.count += times.length;
  model.spentMs += times.reduce((sum, time) => sum + time, 0) * model.runsPerSample;
  return median(times);
}

function flush(runtime, models) {
  const told = models.filter((model) => model.fresh.length);
  if (!told.length) return;
  const body = { runtime, models: {} };
  for (const model of told) {
    body.models[model.id] = {
      samples_ns: model.fresh.map(nanoseconds),
      runs_per_sample: model.runsPerSample,
      block_samples: model.blockSamples,
      ...(model.told ? {} : { warmup: model.warmup }),
    };
    model.told = true;
    model.fresh = [];
  }
  report("timed", body);
}

async function timeTogether(group, models) {
  const { min_runs, min_s, max_s } = job.plan;
  for (const model of models) {
    Object.assign(model, { fresh: [], count: 0, spentMs: 0, told: false });
    step(`Warming ${model.name} up`);
    await warmUp(model);
    doneS += WARM_S;
  }
  const names = models.map((model) => model.name).join(", ");
  const share = (model) => Math.min(1, Math.min(model.count / min_runs, model.spentMs / (min_s * 1000)));
  let last = now();
  for (let round = 0; ; round += 1) {
    // A B C, C B A: what drifts meets all alike.
    for (const model of round % 2 ? [...models].reverse() : models) {
      const took = await block(model);
      postMessage({ block: { model: model.id, ms: took, at: now(), round } });
      await breathe();
    }
    const spentMs = models.reduce((sum, model) => sum + model.spentMs, 0);
    const isDone = models.every((model) => share(model) >= 1) && round >= 40;
    if (isDone || spentMs > models.length * max_s * 1000) break;
    if (now() - last > REPORT_MS || round === 0) {
      flush(group.runtime, models);
      last = now();
      step(`Timing ${names}${models.length > 1 ? ", in turn" : ""}`, Math.min(...models.map(share)), timedS(models));
    }
  }
  flush(group.runtime, models);
  doneS += timedS(models);
}

async function sustain(model) {
  const started = now(), seconds = job.sustained_s;
  let fresh = [], last = started;
  while (now() - started < seconds * 1000) {
    const begun = now(), times = [];
    while (now() - begun < BUCKET_MS) {
      times.push(await sample(model));
      if (paused || times.length % 64 === 0) await breathe();
    }
    const spent = now() - begun, runs = times.length * model.runsPerSample;
    // Rounded so that no bucket reaches into the next.
    fresh.push([Math.ceil((begun - started) * 1e6) + fresh.length, Math.floor(spent * 1e6) - 2, runs, nanoseconds(median(times))]);
    postMessage({ pace: { model: model.id, ms: median(times), minutes: (now() - started) / 60000 } });
    if (now() - last > 2000) {
      report("sustained", { model: model.id, buckets: fresh });
      fresh = [];
      last = now();
      step(`Running ${model.name} for ${seconds < 120 ? `${Math.round(seconds)} seconds` : `${Math.round(seconds / 60)} minutes`}`, (now() - started) / 1000 / seconds, seconds);
    }
  }
  if (fresh.length) report("sustained", { model: model.id, buckets: fresh });
  doneS += seconds;
}

async function measureGroup(group, openModel, loadRuntime) {
  const models = [];
  for (const model of group.models) {
    try {
      await load(model, openModel, loadRuntime);
      await check(model);
      models.push(model);
    } catch (error) {
      report("failed", { model: model.id, reason: reasonOf(error) });
      expectedS -= WARM_S + timedS([model]) + (job.sustained_s ?? 0);
    }
    doneS += LOAD_S + (job.check ? CHECK_S : 0);
  }
  if (!models.length) return;
  postMessage({ moment: { runtime: group.runtime, when: "before" } });
  await timeTogether(group, models);
  postMessage({ moment: { runtime: group.runtime, when: "after" } });
  if (job.sustained_s) for (const model of models) await sustain(model);
}

function reasonOf(error) {
  const hint = /Unexpected input data type/.test(said(error)) ? ". Export a form with float inputs and outputs." : "";
  return said(error) + hint;
}

async function main() {
  expect();
  const { openModel, loadRuntime } = await import("./runtimes.js");
  job.tick_ms = tickMs();
  report("clock", { tick_ns: nanoseconds(job.tick_ms), isolated: Boolean(self.crossOriginIsolated) });
  for (const group of job.groups) {
    await measureGroup(group, openModel, loadRuntime);
    report("complete", { runtime: group.runtime });
  }
}
