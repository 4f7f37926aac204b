"""The one file that is copied onto a device: runs and times model files there.

It needs Python 3.9, numpy and a runtime, and nothing of Tacit. ``python agent.py`` reads one JSON request on stdin and
writes one JSON answer on stdout. When something goes wrong the answer is ``{"error": message, "kind": exception}``
and the exit status 3. A request names what to do in ``op``:

``facts``
    -> processor, cores, clock, versions.
``predict``  ``model, inputs, outputs``
    ``inputs`` names a .npy file for each input, ``(n, *shape)``, channel first; ``outputs`` one for each output.
``time``  ``models, inputs, min_runs, min_s, max_s, warmup_s, min_warmup_runs``
    -> nanoseconds per run of each model, in blocks interleaved between the models.
``memory``  ``model, inputs, runs``
    -> what one model adds to the peak memory of this (fresh) process, and how long it takes to load.

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
from dataclasses import dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from runpy import run_path
from types import TracebackType
from typing import Any, Callable, Dict, List, Optional, Tuple, Type

import numpy as np

AGENT_VERSION = 1
RUNTIME_MODULES = {
    "onnxruntime": "onnxruntime",
    "litert": "ai_edge_litert.interpreter",
    "tflite-runtime": "tflite_runtime.interpreter",
}
RUNTIME_PACKAGES = {"onnxruntime": "onnxruntime", "litert": "ai-edge-litert", "tflite-runtime": "tflite-runtime"}
_CPU = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_BLOCK_NS = 20_000_000  # short against the drift of a clock or a temperature, long against a change of model
_TICKS_PER_SAMPLE = 100
_MAX_SAMPLES = 200_000  # per model: bounds the answer to about a megabyte each
_REFUSED = 3

Request = Dict[str, Any]


@dataclass(frozen=True)
class Port:
    """An input or output of a file; with a scale, a whole number q of it stands for ``scale * (q - zero)``."""

    dtype: Any
    scale: float = 0.0
    zero: int = 0

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Values as the file takes them."""
        if not self.scale:
            if not np.can_cast(values.dtype, self.dtype, "same_kind"):
                raise ValueError(f"expected {self.dtype} inputs, got {values.dtype}; give what the model takes")
            return np.ascontiguousarray(values, dtype=self.dtype)
        limits = np.iinfo(self.dtype)
        whole = np.rint(values / np.float32(self.scale)) + self.zero
        return np.ascontiguousarray(np.clip(whole, limits.min, limits.max), dtype=self.dtype)

    def decode(self, values: np.ndarray) -> np.ndarray:
        """What the file gave, as what it stands for."""
        return (values.astype(np.float32) - self.zero) * np.float32(self.scale) if self.scale else values


Infer = Callable[[List[np.ndarray]], List[np.ndarray]]


@dataclass(frozen=True)
class Model:
    """A model file in a runtime; ``infer`` takes and returns one example as encoded, with batch axes of length one."""

    infer: Infer
    sources: List[Port]
    targets: List[Port]
    layouts: List[str]

    def feeds(self, inputs: List[np.ndarray]) -> List[List[np.ndarray]]:
        """Cut channel-first inputs, each ``(n, *shape)``, into single examples as the file wants them."""
        if len(inputs) != len(self.sources) or len(self.layouts) != len(inputs):
            raise ValueError(f"expected {len(self.sources)} inputs, got {len(inputs)}; give one for each of the model")
        laid = []
        for values, port, layout in zip(inputs, self.sources, self.layouts):
            last = layout == "channel_last" and values.ndim > 2 and values.dtype.kind == "f"  # ids have no channels
            laid.append(port.encode(np.moveaxis(values, 1, -1) if last else values))
        return [[values[index : index + 1] for values in laid] for index in range(len(laid[0]))]

    def run(self, inputs: List[np.ndarray]) -> List[np.ndarray]:
        """Predict outputs, each ``(n, ...)``, from channel-first inputs, each ``(n, *shape)``, one by one."""
        answers = [self.infer(feed) for feed in self.feeds(inputs)]
        columns = [[port.decode(a[place]) for a in answers] for place, port in enumerate(self.targets)]
        for column in columns:
            if any(output.ndim < 1 or len(output) != 1 for output in column):
                raise ValueError(f"expected outputs (1, ...), got {column[0].shape}; export with a batch axis")
        return [np.concatenate(column) for column in columns]


def open_model(model: Request) -> Model:
    """Load a model file; an adapter is a Python file whose ``open_model(path, threads)`` is called in our stead."""
    wanted, layouts, threads, runtime = model.get("sha256"), model["layouts"], model.get("threads", 1), model["runtime"]
    found = hashlib.sha256(Path(model["path"]).read_bytes()).hexdigest() if wanted else None
    if found != wanted:
        raise ValueError(f"expected sha256 {wanted}, got sha256={found}; copy the model file again")
    if not isinstance(layouts, list) or not all(layout in ("channel_first", "channel_last") for layout in layouts):
        raise ValueError(f"expected layouts channel_first or channel_last, got layouts={layouts!r}; give one an input")
    if model.get("adapter"):
        namespace = run_path(model["adapter"])
        infer, sources, targets = namespace["open_model"](model["path"], threads)
        return Model(infer, [Port(*port) for port in sources], [Port(*port) for port in targets], layouts)
    opened = _open_onnx if runtime == "onnxruntime" else _open_tflite
    return Model(*opened(model["path"], threads, _import_runtime(runtime)), layouts)


def _open_onnx(path: str, threads: int, onnxruntime: Any) -> Tuple[Infer, List[Port], List[Port]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    scales = json.loads(session.get_modelmeta().custom_metadata_map.get("tacit.scales", "{}"))
    inputs, outputs = session.get_inputs(), session.get_outputs()
    names, targets = [node.name for node in inputs], [node.name for node in outputs]

    def infer(feeds: List[np.ndarray]) -> Any:
        return session.run(targets, dict(zip(names, feeds)))

    ports = [[Port(_onnx_type(node.type), *scales.get(node.name, ())) for node in side] for side in (inputs, outputs)]
    return infer, ports[0], ports[1]


def _onnx_type(name: str) -> Any:
    return np.dtype({"tensor(float)": "float32", "tensor(double)": "float64"}.get(name, name[len("tensor(") : -1]))


def _open_tflite(path: str, threads: int, module: Any) -> Tuple[Infer, List[Port], List[Port]]:
    interpreter = module.Interpreter(model_path=path, num_threads=threads)
    interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    sources, targets = [node["index"] for node in inputs], [node["index"] for node in outputs]

    def infer(feeds: List[np.ndarray]) -> List[np.ndarray]:
        for source, feed in zip(sources, feeds):
            interpreter.set_tensor(source, feed)
        interpreter.invoke()
        return [interpreter.get_tensor(target) for target in targets]

    ports = [[Port(np.dtype(node["dtype"]), *node["quantization"]) for node in side] for side in (inputs, outputs)]
    return infer, ports[0], ports[1]


def _import_runtime(runtime: str) -> Any:
    if runtime not in RUNTIME_MODULES:
        raise ValueError(f"expected runtime {', '.join(RUNTIME_MODULES)}, got runtime={runtime!r}; give one of them")
    # Official builds of ONNX Runtime send usage events to Microsoft unless told not to before they are imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    return import_module(RUNTIME_MODULES[runtime])


def _load_inputs(request: Request) -> List[np.ndarray]:
    inputs = [np.load(path, allow_pickle=False) for path in request["inputs"]]
    if not inputs or any(v.dtype.kind not in "fiub" or v.shape[:1] != (len(inputs[0]),) or not v.size for v in inputs):
        raise ValueError(
            f"expected inputs (n, *shape), got {[f'{v.dtype} {v.shape}' for v in inputs]}; preprocess them"
        )
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

    name: str
    model: Model
    feeds: List[List[np.ndarray]]
    runs_per_sample: int = 1
    block_samples: int = 1
    warmup_runs: int = 0
    spent_ns: int = 0
    cursor: int = 0
    samples_ns: List[int] = field(default_factory=list)

    def next_feeds(self, count: int) -> List[List[np.ndarray]]:
        feeds = [self.feeds[(self.cursor + step) % len(self.feeds)] for step in range(count)]
        self.cursor = (self.cursor + count) % len(self.feeds)
        return feeds

    def is_done(self, request: Request) -> bool:
        least_s = request["min_s"] if len(self.samples_ns) >= request["min_runs"] else request["max_s"]
        return bool(self.spent_ns >= 1e9 * min(least_s, request["max_s"]))

    def answer(self) -> Request:
        return {name: getattr(self, name) for name in ("samples_ns", "runs_per_sample", "warmup_runs")}


def time_models(request: Request) -> Request:
    """Time models side by side: blocks A B, B A, A B ... so that a drifting device is unfair to none of them."""
    inputs = _load_inputs(request)
    opened = [(model["name"], open_model(model)) for model in request["models"]]
    lanes = [_Lane(name, model, model.feeds(inputs)) for name, model in opened]
    tick_ns = _clock_tick_ns()
    before, ticks_before = conditions(), _cpu_ticks()
    gc.disable()
    for lane in lanes:
        _warm_up(lane, request, tick_ns)
    active, forward = lanes, True
    while active:
        for lane in active if forward else active[::-1]:
            _sample_block(lane)
        active, forward = [lane for lane in active if not lane.is_done(request)], not forward
    gc.enable()
    return {
        "models": {lane.name: lane.answer() for lane in lanes},
        "clock_tick_ns": tick_ns,
        "before": before,
        "after": conditions(),
        "steal_share": _steal_share(ticks_before, _cpu_ticks()),
    }


def _warm_up(lane: _Lane, request: Request, tick_ns: int) -> None:
    """Run until caches and clocks have settled, and learn how many runs make one readable sample."""
    clock, infer = time.perf_counter_ns, lane.model.infer
    durations_ns: List[int] = []
    started_ns = clock()
    while clock() - started_ns < request["warmup_s"] * 1e9 or len(durations_ns) < request["min_warmup_runs"]:
        (feed,) = lane.next_feeds(1)
        start_ns = clock()
        infer(feed)
        durations_ns.append(clock() - start_ns)
    typical_ns = max(1, int(np.median(durations_ns)))
    expected_runs = request["min_s"] * 1e9 / typical_ns
    readable, storable = -(-_TICKS_PER_SAMPLE * tick_ns // typical_ns), -(-expected_runs // _MAX_SAMPLES)
    lane.runs_per_sample = int(max(1, readable, storable))
    lane.block_samples = max(1, int(_BLOCK_NS // (typical_ns * lane.runs_per_sample)))
    lane.warmup_runs = len(durations_ns)


def _sample_block(lane: _Lane) -> None:
    """The timing loop."""
    clock, infer, count = time.perf_counter_ns, lane.model.infer, lane.runs_per_sample
    infer(lane.next_feeds(1)[0])  # untimed: the model before us left its own data in the caches
    for _ in range(lane.block_samples):
        feeds = lane.next_feeds(count)
        start_ns = clock()
        for feed in feeds:
            infer(feed)
        spent_ns = clock() - start_ns
        lane.samples_ns.append(spent_ns // count)
        lane.spent_ns += spent_ns


def _clock_tick_ns() -> int:
    """The smallest step that two readings of the clock show, the cost of reading included."""
    steps_ns = np.diff([time.perf_counter_ns() for _ in range(1000)])
    return int(steps_ns[steps_ns > 0].min(initial=1_000_000_000))


def memory(request: Request) -> Request:
    """Measure a model's time to load, and its part in the peak memory of this process, its runtime already imported."""
    inputs = _load_inputs(request)
    if not request["model"].get("adapter"):
        _import_runtime(request["model"]["runtime"])
    _reset_peak()
    baseline_bytes = _peak_bytes()
    started_ns = time.perf_counter_ns()
    model = open_model(request["model"])
    load_ns = time.perf_counter_ns() - started_ns
    model.run([values[: request["runs"]] for values in inputs])
    added_bytes = max(0, _peak_bytes() - baseline_bytes)
    return {"peak_memory_bytes": added_bytes, "baseline_bytes": baseline_bytes, "load_ns": load_ns}


def _reset_peak() -> None:
    """Bring the recorded peak down to what is in use now, or importing would hide the model; best effort."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # freed pages would take the model in without a trace
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_bytes() -> int:
    status = _read("/proc/self/status")
    if status is not None and "VmHWM:" in status:
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    import resource  # not on Windows, which has no such figure

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def facts(request: Request) -> Request:
    """Describe the device, flat; what cannot be read is null."""
    del request
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "agent_version": AGENT_VERSION,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "affinity": ",".join(map(str, sorted(affinity(0)))) if affinity else None,
        "machine": platform.machine(),
        "os": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        **{runtime: _version(package) for runtime, package in RUNTIME_PACKAGES.items()},
        **conditions(),
    }


def conditions() -> Request:
    """What may change while we measure."""
    frequency, temperature = _read(_CPU / "scaling_cur_freq"), _read("/sys/class/thermal/thermal_zone0/temp")
    governor = _read(_CPU / "scaling_governor")
    return {
        "governor": governor.strip() if governor else None,
        "cur_freq_khz": int(frequency) if frequency else None,
        "temperature_c": int(temperature) / 1000 if temperature else None,
        "load_1m": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _cpu_name() -> Optional[str]:
    board = _read("/proc/device-tree/model")  # a Raspberry Pi says "Raspberry Pi 5 Model B Rev 1.0" here
    if board:
        return board.strip("\0\n ")
    names = [line for line in (_read("/proc/cpuinfo") or "").splitlines() if line.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or None


def _version(package: str) -> Optional[str]:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _read(path: Any) -> Optional[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _cpu_ticks() -> List[int]:
    first = (_read("/proc/stat") or "").split("\n", 1)[0].split()
    return [int(value) for value in first[1:9]]  # user nice system idle iowait irq softirq steal


def _steal_share(before: List[int], after: List[int]) -> Optional[float]:
    """The share of time that a hypervisor gave to other machines."""
    passed = sum(after) - sum(before)
    return round((after[7] - before[7]) / passed, 4) if len(after) == len(before) == 8 and passed > 0 else None


OPERATIONS = {"facts": facts, "predict": predict, "time": time_models, "memory": memory}


def main() -> None:
    """Answer the request on stdin."""
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a runtime that prints must not spoil the answer

    def refuse(kind: Type[BaseException], error: BaseException, _where: Optional[TracebackType]) -> None:
        # A hook and not an except clause: the runtimes raise types of their own, straight from Exception.
        print(json.dumps({"error": str(error), "kind": kind.__name__}), file=answer_to, flush=True)
        os._exit(_REFUSED)

    sys.excepthook = refuse
    request = json.loads(sys.stdin.read())
    if not isinstance(request, dict) or request.get("op") not in OPERATIONS:
        raise ValueError(f"expected a request whose op is one of {sorted(OPERATIONS)}; send one")
    print(json.dumps(OPERATIONS[request["op"]](request)), file=answer_to, flush=True)


if __name__ == "__main__":
    main()
