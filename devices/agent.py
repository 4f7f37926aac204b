"""The one file that is copied onto a device: runs and times model files there.

It needs Python 3.9, numpy and a runtime, and nothing of Tacit. ``python agent.py`` reads one JSON request on stdin and
writes one JSON answer on stdout. When something goes wrong the answer is ``{"error": message, "kind": exception}``
and the exit status 3. A request names what to do in ``op``:

``facts`` -> processor, cores, versions.
``predict``  ``model, inputs, outputs``
    ``inputs`` names a .npy file for each input, ``(n, *shape)``, channel first; ``outputs`` one for each output.
``cold``, ``memory``  ``model, inputs, runs``
    -> what importing the runtime, loading a model and its first inference take in this fresh process, and what memory
    is added by the latter two; ``memory`` first frees what importing left.
``time``  ``models, inputs, min_runs, min_s, max_s``, the warm-up's ``warmup_s, max_warmup_s, min_warmup_runs``
    -> nanoseconds per run of each model, in blocks interleaved between the models; ``disturbed`` are the places of
    those during which another program had the processor.
``sustain``  ``model, inputs, seconds, idle_s, min_s`` and the warm-up's
    -> what happens in each second (longer, if there were over 1,800) of rest, then of one model without a pause.
``profile``  ``model, inputs, runs``
    -> nanoseconds in each operator, as far as the runtime can say.

``facts``, ``time`` and ``sustain`` take ``watch``: patterns of files that tell of the device's state.
What they hold comes back as ``readings``, for the host to interpret.

A model is ``{"name", "path", "runtime", "layouts", "threads", "sha256", "adapter"}``. Each is run with a batch of one:
that is how a device runs it, and a dynamically quantised model gives other numbers when a batch shares one scale.
Whole-number inputs and outputs with a scale are given and returned as the floats that they stand for.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from runpy import run_path
from typing import Any

import numpy as np

AGENT_VERSION = 2
RUNTIME_PACKAGES = {"onnxruntime": "onnxruntime", "litert": "ai-edge-litert", "tflite-runtime": "tflite-runtime"}
_ONNX_TYPES = {"float": "float32", "double": "float64"}  # the others are called what numpy calls them
_BLOCK_NS = 20_000_000  # short against the drift of a clock or a temperature, long against a change of model
_MAX_SAMPLES = 200_000  # per model: a bound of about a megabyte each; the others bound the answer, too
_MAX_BUCKETS, _MAX_FILES, _MAX_CHARACTERS, _MAX_OPERATORS = 1_800, 256, 200, 256
_TICKS_PER_SAMPLE = 100
_SETTLED = _DISTURBED = 0.02  # of the median in a quarter of the warm-up; of a sample's time without the processor

Request = dict[str, Any]


@dataclass(frozen=True)
class Port:
    """An input or output of a file; with a scale, a whole number q of it stands for ``scale * (q - zero)``."""

    dtype: Any
    scale: float = 0.0
    zero: int = 0

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Values as the file takes them."""
        if self.scale:
            limits = np.iinfo(self.dtype)
            values = np.clip(np.rint(values / np.float32(self.scale)) + self.zero, limits.min, limits.max)
        elif not np.can_cast(values.dtype, self.dtype, "same_kind"):
            raise ValueError(f"expected {self.dtype} inputs, got {values.dtype}; give what the model takes")
        return np.ascontiguousarray(values, dtype=self.dtype)

    def decode(self, values: np.ndarray) -> np.ndarray:
        """What the file gave, as what it stands for."""
        return (values.astype(np.float32) - self.zero) * np.float32(self.scale) if self.scale else values


@dataclass(frozen=True)
class Model:
    """A model file in a runtime; ``infer`` takes and returns one example as encoded, with batch axes of length one."""

    layouts: list[str]
    infer: Callable[[list[np.ndarray]], list[np.ndarray]]
    sources: list[Port]
    targets: list[Port]
    operators: Callable[[], list[tuple[str, str, int]]] | None = None  # name, type and nanoseconds, run after run

    def feeds(self, inputs: list[np.ndarray]) -> list[list[np.ndarray]]:
        """Cut channel-first inputs, each ``(n, *shape)``, into single examples as the file wants them."""
        if len(inputs) != len(self.sources) or len(self.layouts) != len(inputs):
            raise ValueError(f"expected {len(self.sources)} inputs, got {len(inputs)}; give one for each of the model")
        laid = []
        for values, port, layout in zip(inputs, self.sources, self.layouts):
            last = layout == "channel_last" and values.ndim > 2 and values.dtype.kind == "f"  # ids have no channels
            laid.append(port.encode(np.moveaxis(values, 1, -1) if last else values))
        return [[values[index : index + 1] for values in laid] for index in range(len(laid[0]))]

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Predict outputs, each ``(n, ...)``, from channel-first inputs, each ``(n, *shape)``, one by one."""
        answers = [self.infer(feed) for feed in self.feeds(inputs)]
        columns = [[port.decode(a[place]) for a in answers] for place, port in enumerate(self.targets)]
        if any(output.shape[:1] != (1,) for column in columns for output in column):
            found = [column[0].shape for column in columns]
            raise ValueError(f"expected outputs (1, ...), got {found}; export with a batch axis")
        return [np.concatenate(column) for column in columns]


def import_runtime(model: Request) -> Any:
    """Return the module of a runtime, or the namespace of an adapter: a Python file that stands in for the openers.

    Its ``open_model(path, threads)`` returns what they do; ``open_profiled``, which adds ``operators``, and
    ``import_runtime()`` may be missing.
    """
    if model.get("adapter"):
        adapter = run_path(model["adapter"])
        adapter.get("import_runtime", dict)()
        return adapter
    # Official builds of ONNX Runtime send usage events to Microsoft unless told not to before they are imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    module = RUNTIME_PACKAGES[model["runtime"]].replace("-", "_")
    return import_module(module if module == "onnxruntime" else f"{module}.interpreter")


def open_model(model: Request, *, profiled: bool = False) -> Model:
    """Load a model file."""
    runtime, path, threads = import_runtime(model), model["path"], model.get("threads", 1)
    if model.get("adapter"):
        opened = runtime["open_profiled" if profiled and "open_profiled" in runtime else "open_model"](path, threads)
    elif model["runtime"] == "onnxruntime":
        opened = _open_onnx(path, threads, runtime, profiled=profiled)
    else:
        opened = _open_tflite(path, threads, runtime)
    infer, sources, targets, *operators = opened
    return Model(model["layouts"], infer, [Port(*p) for p in sources], [Port(*p) for p in targets], *operators)


def _open_onnx(path: str, threads: int, onnxruntime: Any, *, profiled: bool) -> tuple[Any, ...]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level, options.enable_profiling = 3, profiled  # errors alone
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    scales = json.loads(session.get_modelmeta().custom_metadata_map.get("tacit.scales", "{}"))
    names, targets = [node.name for node in session.get_inputs()], [node.name for node in session.get_outputs()]

    def infer(feeds: list[np.ndarray]) -> Any:
        return session.run(targets, dict(zip(names, feeds)))

    def port(node: Any) -> tuple[Any, ...]:
        name = node.type[len("tensor(") : -1]
        return (np.dtype(_ONNX_TYPES.get(name, name)), *scales.get(node.name, ()))

    def operators() -> list[tuple[str, str, int]]:
        events = json.loads(Path(session.end_profiling()).read_bytes())
        nodes = [event for event in events if event["name"].endswith("_kernel_time")]
        return [(node["name"][: -len("_kernel_time")], node["args"]["op_name"], 1000 * node["dur"]) for node in nodes]

    ports = ([port(node) for node in side] for side in (session.get_inputs(), session.get_outputs()))
    return (infer, *ports, operators) if profiled else (infer, *ports)


def _open_tflite(path: str, threads: int, module: Any) -> tuple[Any, ...]:
    interpreter = module.Interpreter(model_path=path, num_threads=threads)
    interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    sources, targets = [node["index"] for node in inputs], [node["index"] for node in outputs]

    def infer(feeds: list[np.ndarray]) -> list[np.ndarray]:
        for source, feed in zip(sources, feeds):
            interpreter.set_tensor(source, feed)
        interpreter.invoke()
        return [interpreter.get_tensor(target) for target in targets]

    return (infer, *([(np.dtype(node["dtype"]), *node["quantization"]) for node in side] for side in (inputs, outputs)))


def _load_inputs(request: Request) -> list[np.ndarray]:
    inputs = [np.load(path, allow_pickle=False) for path in request["inputs"]]
    if not inputs or any(v.dtype.kind not in "fiub" or v.shape[:1] != (len(inputs[0]),) or not v.size for v in inputs):
        raise ValueError(f"expected inputs (n, *shape), got {[values.shape for values in inputs]}; preprocess them")
    return inputs


def predict(request: Request) -> Request:
    """Run a model on every input and write the outputs."""
    outputs = open_model(request["model"]).run(_load_inputs(request))
    if len(outputs) != len(request["outputs"]):
        raise ValueError(f"expected {len(request['outputs'])} outputs, got {len(outputs)}; name a file for each")
    for path, values in zip(request["outputs"], outputs):
        np.save(path, values, allow_pickle=False)
    return {"n": len(outputs[0])}


@dataclass
class _Lane:
    """One model under the clock: what it has run so far."""

    model: Model
    feeds: list[list[np.ndarray]]
    runs_per_sample: int = 1
    block_samples: int = 1
    warmup: Request = field(default_factory=dict)
    runs: int = 0
    spent_ns: int = 0
    samples_ns: list[int] = field(default_factory=list)
    disturbed: list[int] = field(default_factory=list)

    def sample(self) -> None:
        """The timing loop."""
        clock, infer, count = time.perf_counter_ns, self.model.infer, self.runs_per_sample
        for _ in range(self.block_samples):
            feeds = [self.feeds[run % len(self.feeds)] for run in range(self.runs, self.runs + count)]
            worked_ns, start_ns = time.thread_time_ns(), clock()
            for feed in feeds:
                infer(feed)
            spent_ns = clock() - start_ns
            if time.thread_time_ns() - worked_ns < (1 - _DISTURBED) * spent_ns:
                self.disturbed.append(len(self.samples_ns))
            self.samples_ns.append(spent_ns // count)
            self.spent_ns += spent_ns
            self.runs += count

    def needs(self, request: Request) -> bool:
        is_enough = len(self.samples_ns) >= request["min_runs"]
        return bool(self.spent_ns < 1e9 * request["min_s" if is_enough else "max_s"])


def _warm_lane(model: Request, request: Request) -> _Lane:
    """Run a model until caches and clocks have settled, and learn how many runs make one readable sample."""
    opened, clock = open_model(model), time.perf_counter_ns
    gc.disable()
    lane = _Lane(opened, opened.feeds(_load_inputs(request)))
    spent, slope, passed_ns, started_ns, check_ns = lane.samples_ns, None, 0, clock(), 1e9 * request["warmup_s"]
    while passed_ns < 1e9 * request["max_warmup_s"] and (slope is None or abs(slope) >= _SETTLED):
        lane.sample()
        passed_ns = clock() - started_ns
        if passed_ns >= check_ns and len(spent) >= request["min_warmup_runs"]:
            quarter, check_ns = -(-len(spent) // 4), 1.25 * passed_ns
            slope = float(np.median(spent[-quarter:]) / np.median(spent[-2 * quarter : -quarter]) - 1)
    steps_ns = np.diff([clock() for _ in range(1000)])  # of which the smallest is a tick, the reading included
    readable_ns = _TICKS_PER_SAMPLE * int(steps_ns[steps_ns > 0].min(initial=10**9))
    storable_ns, typical_ns = request["min_s"] * 1e9 / _MAX_SAMPLES, max(1, int(np.median(spent)))
    lane.runs_per_sample = int(np.ceil(max(typical_ns, readable_ns, storable_ns) / typical_ns))
    lane.block_samples = max(1, int(_BLOCK_NS // (typical_ns * lane.runs_per_sample)))
    lane.warmup, lane.spent_ns = {"runs": lane.runs, "spent_ns": passed_ns, "slope": slope}, 0
    lane.samples_ns, lane.disturbed = [], []
    return lane


def time_models(request: Request) -> Request:
    """Time models side by side: blocks A B, B A, A B ... so that a drifting device is unfair to none of them."""
    lanes = {model["name"]: _warm_lane(model, request) for model in request["models"]}
    before, order = _readings(request), list(lanes.values())
    # All go on until the last is done: the same block of each was measured at the same time.
    while any(lane.needs(request) for lane in order):
        for lane in order:
            if lane.spent_ns < 1e9 * request["max_s"]:
                lane.model.infer(lane.feeds[0])  # untimed: the model before us left its data in the caches
                lane.sample()
        order.reverse()
    told = ("samples_ns", "disturbed", "runs_per_sample", "block_samples", "warmup")
    models = {name: {key: getattr(lane, key) for key in told} for name, lane in lanes.items()}
    return {"models": models, "readings": [before, _readings(request)]}


def sustain(request: Request) -> Request:
    """Run one model for minutes, after a rest that shows what the device does and draws when idle."""
    lane, clock, rows, readings = _warm_lane(request["model"], request), time.perf_counter_ns, [], [_readings(request)]
    rest_ns, bucket_ns = 1e9 * request["idle_s"], 1e9 * max(1.0, request["seconds"] / _MAX_BUCKETS)
    origin_ns, start_ns = clock(), clock()
    while start_ns - origin_ns < rest_ns + 1e9 * request["seconds"]:
        lane.samples_ns, lane.runs, resting = [], 0, start_ns - origin_ns < rest_ns
        while not resting and clock() - start_ns < bucket_ns:
            lane.sample()
        if resting:
            time.sleep(bucket_ns / 1e9)
        median_ns = None if resting else int(np.median(lane.samples_ns))
        readings.append(_readings(request))
        rows.append([start_ns - origin_ns, clock() - start_ns, lane.runs, median_ns])
        start_ns = clock()
    return {"buckets": rows, "readings": readings}  # a bucket: start, length, runs, median; readings before and after


def fresh_start(request: Request) -> Request:
    """Take a model from nothing to its first inference and through more: how long that took, and what memory."""
    inputs, clock = [values[: request["runs"]] for values in _load_inputs(request)], time.perf_counter_ns
    start_ns = clock()
    import_runtime(request["model"])
    import_ns = clock() - start_ns
    if request["op"] == "memory":
        _reset_peak()
    baseline_bytes, start_ns = _peak_bytes(), clock()
    model = open_model(request["model"])
    load_ns = clock() - start_ns
    feed, start_ns = model.feeds(inputs)[0], clock()
    model.infer(feed)
    times = {"import_ns": import_ns, "load_ns": load_ns, "first_ns": clock() - start_ns}
    model.run(inputs)
    return {**times, "peak_memory_bytes": max(0, _peak_bytes() - baseline_bytes), "baseline_bytes": baseline_bytes}


def _reset_peak() -> None:
    """Bring the recorded peak down to what is in use now, or importing would hide the model; best effort."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # freed pages would take the model in without a trace
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_bytes() -> int:
    status = _read("/proc/self/status") or ""
    if "VmHWM:" in status:
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    import resource  # not on Windows, which has no such figure

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def profile(request: Request) -> Request:
    """Add up where the time goes, by the runtime's own profiler, which costs time itself; without the first run."""
    model = open_model(request["model"], profiled=True)
    if model.operators is None:
        return {"operators": None}
    feeds, spent = model.feeds(_load_inputs(request)), dict[tuple[str, str], list[int]]()
    for run in range(request["runs"] + 1):
        model.infer(feeds[run % len(feeds)])
    for name, kind, spent_ns in model.operators():
        spent.setdefault((name, kind), []).append(spent_ns)
    for times in spent.values():  # one interruption would decide what takes longest: medians, of what runs once
        times[:] = [int(np.median(times))] * len(times) if len(times) == request["runs"] + 1 else times
    rows: list[Any] = [[*key, len(times) - 1, sum(times[1:])] for key, times in spent.items()]
    return {"operators": sorted(rows, key=lambda row: -row[3])[:_MAX_OPERATORS], "runs": request["runs"]}


def facts(request: Request) -> Request:
    """Describe the device, flat; what cannot be read is null."""
    affinity, lines = getattr(os, "sched_getaffinity", None), (_read("/proc/cpuinfo") or "").splitlines()
    names = [line.split(":", 1)[1] for line in lines if line.startswith("model name")] or [platform.processor()]
    board = _read("/proc/device-tree/model")  # a Raspberry Pi says "Raspberry Pi 5 Model B Rev 1.0" here
    packages = {runtime: list(metadata.distributions(name=name)) for runtime, name in RUNTIME_PACKAGES.items()}
    return {
        "agent_version": AGENT_VERSION,
        "cpu": (board or names[0]).strip("\0\n ") or None,
        "cores": os.cpu_count(),
        "affinity": ",".join(map(str, sorted(affinity(0)))) if affinity else None,
        "machine": platform.machine(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        **{runtime: found[0].version if found else None for runtime, found in packages.items()},
        **({"readings": [_readings(request)]} if "watch" in request else {}),
    }


def _readings(request: Request) -> Request:
    """What the watched files hold, as it is."""
    paths = [path for pattern in request.get("watch", []) for path in sorted(Path("/").glob(pattern.lstrip("/")))]
    return {str(path): (_read(path) or "")[:_MAX_CHARACTERS] for path in paths[:_MAX_FILES]}


def _read(path: Any) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


OPERATIONS = {"facts": facts, "predict": predict, "time": time_models, "sustain": sustain, "profile": profile}
OPERATIONS.update(cold=fresh_start, memory=fresh_start)


def main() -> None:
    """Answer the request on stdin."""
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a runtime that prints must not spoil the answer

    def refuse(kind: type[BaseException], error: BaseException, _where: object) -> None:
        # A hook and not an except clause: the runtimes raise types of their own, straight from Exception.
        print(json.dumps({"error": str(error), "kind": kind.__name__}), file=answer_to, flush=True)
        os._exit(3)

    sys.excepthook = refuse
    request = json.loads(sys.stdin.read())
    if not isinstance(request, dict) or request.get("op") not in OPERATIONS:
        raise ValueError(f"expected a request whose op is one of {sorted(OPERATIONS)}; send one")
    for model in [*request.get("models", []), *([request["model"]] if "model" in request else [])]:
        wanted = model.get("sha256")
        if wanted and hashlib.sha256(Path(model["path"]).read_bytes()).hexdigest() != wanted:
            raise ValueError(f"expected sha256 {wanted}, got the content of another file; copy the model file again")
    print(json.dumps(OPERATIONS[request["op"]](request)), file=answer_to, flush=True)


if __name__ == "__main__":
    main()
