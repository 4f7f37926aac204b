// Runs one model on the inputs that the server holds, one example at a time, and sends back what it answers.

import { openModel } from "./runtimes.js";

const TYPES = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array };

async function content(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status}`);
  return response.arrayBuffer();
}

function example(input, index) {
  const size = input.shape.reduce((product, side) => product * side, 1);
  return { type: input.type, shape: [1, ...input.shape], values: input.values.slice(index * size, (index + 1) * size) };
}

function joined(answers) {
  const parts = answers.flat().map((answer) => answer.values);
  return new Blob(parts.map((part) => new Uint8Array(part.buffer, part.byteOffset, part.byteLength)));
}

async function main() {
  const job = JSON.parse(new TextDecoder().decode(await content("job")));
  const model = await content("model");
  const infer = await openModel(job.kind, model);
  const inputs = await Promise.all(
    job.inputs.map(async (input, place) => ({ ...input, values: new TYPES[input.type](await content(`input/${place}`)) })),
  );
  const runs = [];
  for (let index = 0; index < job.n; index += 1) runs.push(await infer(inputs.map((input) => example(input, index))));
  const outputs = runs[0].map((_, place) => runs.map((run) => run[place]));
  const described = outputs.map((answers) => ({ type: answers[0].type, shape: answers[0].shape }));
  // One line that says what follows, then the numbers of each output, example after example.
  return new Blob([`${JSON.stringify(described)}\n`, ...outputs.map(joined)]);
}

async function send(name, body) {
  await fetch(name, { method: "POST", body });
  document.getElementById("state").textContent = "Done; this page can be closed.";
}

main().then(
  (answer) => send("answer", answer),
  (error) => send("error", String(error && error.message ? error.message : error).slice(0, 1000)),
);
