// The two runtimes behind one function: a model's bytes become a function that maps one example's inputs to its outputs.

let onnx, tflite; // loaded once, when the first model asks for them

async function loadOnnx() {
  const ort = await import("./vendor/onnxruntime-web/ort.wasm.min.mjs");
  ort.env.wasm.numThreads = 1;
  ort.env.wasm.wasmPaths = new URL("./vendor/onnxruntime-web/", import.meta.url).href;
  return ort;
}

async function loadTflite() {
  const litert = await import("./vendor/litert/index.js");
  const folder = new URL("./vendor/litert/wasm/", import.meta.url).href;
  // In a worker its loader would look beside the worker's own script.
  self.Module = { locateFile: (name) => folder + name };
  await litert.loadLiteRt(folder);
  return litert;
}

async function openOnnx(model) {
  const ort = await (onnx ??= loadOnnx());
  const session = await ort.InferenceSession.create(new Uint8Array(model), { executionProviders: ["wasm"] });
  return async (inputs) => {
    const feeds = Object.fromEntries(
      session.inputNames.map((name, place) => [name, new ort.Tensor(inputs[place].type, inputs[place].values, inputs[place].shape)]),
    );
    const answers = await session.run(feeds);
    return session.outputNames.map((name) => ({ type: answers[name].type, shape: answers[name].dims, values: answers[name].data }));
  };
}

async function openTflite(model) {
  const litert = await (tflite ??= loadTflite());
  const compiled = await litert.loadAndCompile(new Uint8Array(model), { accelerator: "wasm" }).catch((error) => {
    const hint = /Element type \w+ is not supported/.test(error.message) ? " Export a form with float inputs and outputs." : "";
    throw new Error(error.message + hint);
  });
  return async (inputs) => {
    const tensors = inputs.map((input) => new litert.Tensor(input.values, input.shape));
    const answers = await compiled.run(tensors);
    const read = answers.map((answer) => {
      const values = answer.toTypedArray().slice();
      return { type: values instanceof Int32Array ? "int32" : "float32", shape: [...answer.type.layout.dimensions], values };
    });
    for (const tensor of [...tensors, ...answers]) tensor.delete();
    return read;
  };
}

// Inputs and outputs are { type, shape, values }, shapes with the batch of one.
export function openModel(kind, model) {
  return kind === "onnx" ? openOnnx(model) : openTflite(model);
}

export const loadRuntime = (kind) => (kind === "onnx" ? (onnx ??= loadOnnx()) : (tflite ??= loadTflite()));
