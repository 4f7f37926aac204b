"""The one file that is copied onto a device: runs and times model files there.

It needs Python 3.9, numpy and a runtime, and nothing of Tacit. ``python agent.py`` reads one JSON request on stdin and
writes one JSON answer on stdout. When something goes wrong the answer is ``{"error": message, "kind": exception}``
and the exit status 3. A request names what to do in ``op``:

``facts``
    -> processor, cores, clock, versions.
``predict``  ``model, inputs, outputs``
    ``inputs`` is a .npy file, float32 ``(n, *shape)``, channel first; writes float32 ``(n, ...)`` to ``outputs``.
``time``  ``models, inputs, min_runs, min_s, max_s, warmup_s, min_warmup_runs``
    -> nanoseconds per run of each model, in blocks interleaved between the models.
``memory``  ``model, inputs, runs``
    -> what one model adds to the peak memory of this (fresh) process, and how long it takes to load.

A model is ``{"name", "path", "runtime", "input_layout", "threads", "sha256"}``. Every model is run with a batch of one:
that is how a device runs it, and a dynamically quantised model gives other numbers when a batch shares one scale.
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
from types import TracebackType
from typing import Any, Callable, Dict, List, Optional, Type

import numpy as np

AGENT_VERSION = 1
RUNTIME_MODULES = {"onnxruntime": "onnxruntime", "litert": "ai_edge_litert.interpreter"}
RUNTIME_PACKAGES = {"onnxruntime": "onnxruntime", "litert": "ai-edge-litert"}
_CPU = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_BLOCK_NS = 20_000_000  # short against the drift of a clock or a temperature, long against a change of model
_TICKS_PER_SAMPLE = 100
_MAX_SAMPLES = 200_000  # per model: bounds the answer to about a megabyte each
_REFUSED = 3

Request = Dict[str, Any]


@dataclass(frozen=True)
class Model:
    """A model file in a runtime; ``infer`` takes and returns one example with its batch axis of length one."""

    infer: Callable[[np.ndarray], np.ndarray]
    input_layout: str

    def feeds(self, inputs: np.ndarray) -> List[np.ndarray]:
        """Cut channel-first inputs ``(n, *shape)`` into single examples, laid out as the file wants them."""
        inputs = np.asarray(inputs, dtype=np.float32)
        if self.input_layout == "channel_last" and inputs.ndim > 2:
            inputs = np.moveaxis(inputs, 1, -1)
        inputs = np.ascontiguousarray(inputs)
        return [inputs[index : index + 1] for index in range(len(inputs))]

    def run(self, inputs: np.ndarray) -> np.ndarray:
        """Predict ``(n, ...)`` float32 from channel-first inputs ``(n, *shape)``, one example at a time."""
        outputs = [self.infer(feed) for feed in self.feeds(inputs)]
        if any(output.dtype != np.float32 or output.ndim < 2 or len(output) != 1 for output in outputs):
            bad = outputs[0]
            raise ValueError(f"expected float32 outputs (1, ...), got {bad.dtype} {bad.shape}; export float I/O")
        return np.concatenate(outputs)


def open_model(path: str, runtime: str, threads: int = 1, input_layout: str = "channel_first") -> Model:
    """Load a model file.

    Args:
        path: The .onnx or .tflite file.
        runtime: "onnxruntime" or "litert".
        threads: Threads that work on one inference.
        input_layout: "channel_first" or "channel_last": what the file expects.

    Raises:
        ValueError: An argument is unknown, or the model's input or output is not one float32 tensor.
        ModuleNotFoundError: The runtime is not installed.
    """
    if input_layout not in ("channel_first", "channel_last"):
        raise ValueError(
            f"expected input_layout channel_first or channel_last, got input_layout={input_layout!r}; give one of them"
        )
    if runtime == "onnxruntime":
        return Model(_open_onnx(path, threads), input_layout)
    if runtime == "litert":
        return Model(_open_litert(path, threads), input_layout)
    raise ValueError(f"expected runtime onnxruntime or litert, got runtime={runtime!r}; give one of them")


def _open_onnx(path: str, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    onnxruntime = _import_runtime("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), session.get_outputs()
    _require_one_float([node.type for node in inputs], [node.type for node in outputs], "tensor(float)")
    source, targets = inputs[0].name, [outputs[0].name]

    def infer(feed: np.ndarray) -> np.ndarray:
        result: np.ndarray = session.run(targets, {source: feed})[0]
        return result

    return infer


def _open_litert(path: str, threads: int) -> Callable[[np.ndarray], np.ndarray]:
    interpreter = _import_runtime("litert").Interpreter(model_path=path, num_threads=threads)
    interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    _require_one_float([node["dtype"] for node in inputs], [node["dtype"] for node in outputs], np.float32)
    source, target = inputs[0]["index"], outputs[0]["index"]

    def infer(feed: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(source, feed)
        interpreter.invoke()
        result: np.ndarray = interpreter.get_tensor(target)
        return result

    return infer


def _import_runtime(runtime: str) -> Any:
    if runtime not in RUNTIME_MODULES:
        raise ValueError(f"expected runtime onnxruntime or litert, got runtime={runtime!r}; give one of them")
    # Official builds of ONNX Runtime send usage events to Microsoft unless told not to before they are imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    return import_module(RUNTIME_MODULES[runtime])


def _require_one_float(inputs: List[Any], outputs: List[Any], wanted: Any) -> None:
    if inputs != [wanted] or outputs != [wanted]:
        raise ValueError(
            f"expected one float32 input and output, got inputs={inputs} outputs={outputs}; export with float I/O"
        )


def _open_requested(model: Request) -> Model:
    wanted = model.get("sha256")
    if wanted is not None:
        found = hashlib.sha256(Path(model["path"]).read_bytes()).hexdigest()
        if found != wanted:
            raise ValueError(f"expected sha256 {wanted}, got sha256={found}; copy the model file again")
    return open_model(model["path"], model["runtime"], model.get("threads", 1), model["input_layout"])


def _load_inputs(request: Request) -> np.ndarray:
    inputs: np.ndarray = np.load(request["inputs"], allow_pickle=False)
    if inputs.dtype != np.float32 or inputs.ndim < 2 or not len(inputs):
        raise ValueError(f"expected float32 inputs (n, *shape), got {inputs.dtype} {inputs.shape}; preprocess them")
    return inputs


def predict(request: Request) -> Request:
    """Run a model on every input and write the outputs."""
    outputs = _open_requested(request["model"]).run(_load_inputs(request))
    np.save(request["outputs"], outputs, allow_pickle=False)
    return {"n": len(outputs)}


@dataclass
class _Lane:
    """One model under the clock: what it has run so far."""

    name: str
    model: Model
    feeds: List[np.ndarray]
    runs_per_sample: int = 1
    block_samples: int = 1
    warmup_runs: int = 0
    spent_ns: int = 0
    cursor: int = 0
    samples_ns: List[int] = field(default_factory=list)

    def next_feeds(self, count: int) -> List[np.ndarray]:
        feeds = [self.feeds[(self.cursor + step) % len(self.feeds)] for step in range(count)]
        self.cursor = (self.cursor + count) % len(self.feeds)
        return feeds

    def is_done(self, request: Request) -> bool:
        spent_s = self.spent_ns / 1e9
        enough = len(self.samples_ns) >= request["min_runs"] and spent_s >= request["min_s"]
        return bool(enough or spent_s >= request["max_s"])


def time_models(request: Request) -> Request:
    """Time models side by side: blocks A B, B A, A B ... so that a drifting device is unfair to none of them."""
    inputs = _load_inputs(request)
    lanes = [_open_lane(model, inputs) for model in request["models"]]
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
        "models": {lane.name: _lane_answer(lane) for lane in lanes},
        "clock_tick_ns": tick_ns,
        "before": before,
        "after": conditions(),
        "steal_share": _steal_share(ticks_before, _cpu_ticks()),
    }


def _open_lane(model: Request, inputs: np.ndarray) -> _Lane:
    opened = _open_requested(model)
    return _Lane(model["name"], opened, opened.feeds(inputs))


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


def _lane_answer(lane: _Lane) -> Request:
    return {
        "samples_ns": lane.samples_ns,
        "runs_per_sample": lane.runs_per_sample,
        "warmup_runs": lane.warmup_runs,
    }


def memory(request: Request) -> Request:
    """Measure what one model adds to the peak resident memory of this process, its runtime already imported.

    The time to load is taken here too: a second model of a process finds the runtime's set-up already done.
    """
    inputs = _load_inputs(request)
    _import_runtime(request["model"]["runtime"])
    _reset_peak()
    baseline_bytes = _peak_bytes()
    started_ns = time.perf_counter_ns()
    model = _open_requested(request["model"])
    load_ns = time.perf_counter_ns() - started_ns
    model.run(inputs[: request["runs"]])
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
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or None


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


OPERATIONS: Dict[str, Callable[[Request], Request]] = {
    "facts": facts,
    "predict": predict,
    "time": time_models,
    "memory": memory,
}


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
