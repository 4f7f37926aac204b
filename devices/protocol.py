"""Plans what to ask a device, asks it, and judges what the samples support."""

import hashlib
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tacit.devices.answers import Timed, believe_facts, believe_memory, believe_timings
from tacit.devices.formats import examine
from tacit.devices.runtime import InputLayout, RuntimeName, adapter_of
from tacit.devices.sandbox import ArtifactRefused
from tacit.devices.statistics import (
    coefficient_of_variation,
    drift,
    percentile_estimate,
    percentile_interval,
    ratio_interval,
)

SCHEMA_VERSION = 1
Mode = Literal["quick", "full"]
_MEMORY_RUNS = 20
_MAX_INPUTS = 256
_PLOT_POINTS = 256
_NOISY_CV = 0.10
_DRIFTING = 0.05
_STEAL_SHARE = 0.02
_LIMIT_MARGIN_S = 30.0  # to start Python, import a runtime and load models on a slow board
_REFUSALS = (ArtifactRefused, FileNotFoundError, ModuleNotFoundError)


class Device(Protocol):
    """The seam: a place where model files run. Requests and answers are those of ``agent.py``."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def put(self, path: Path) -> str:
        """Copy a file onto the device; the result names it in requests."""

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request to the agent; raises ``ArtifactRefused`` when it does not succeed."""

    def get(self, remote: str) -> bytes:
        """Fetch a file that the agent wrote."""

    def facts(self) -> dict[str, Any]:
        """Describe the device."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A model file to be measured, under the name that the result will use; in its format's own runtime by default."""

    name: str
    path: Path
    input_layout: InputLayout = "channel_first"
    runtime: RuntimeName | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long to measure each artifact: both minima hold, ``max_s`` of timed work ends it in any case."""

    mode: Mode
    min_runs: int
    min_s: float
    max_s: float
    warmup_s: float
    min_warmup_runs: int


@dataclass(frozen=True, kw_only=True)
class Latency:
    """What one artifact's samples support; a percentile that they do not support is None.

    ``cv`` leaves out the largest 1 % of the samples. Flags: ``noisy`` (cv above 10 %), ``drift`` (the median moved by
    more than 5 % between first and last third), ``few-samples`` (no p90), ``averaged`` (a sample is a mean of several
    runs, so the tail is flatter than a user would see), ``steal`` (a hypervisor took more than 2 % of the time).
    """

    p50_us: float | None
    p90_us: float | None
    p99_us: float | None
    ci: dict[str, tuple[float, float] | None]
    min_us: float
    n: int
    cv: float
    drift: float
    flags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Placed:
    artifact: Artifact
    remote: str
    runtime: RuntimeName
    sha256: str
    peak_memory_bytes: int | None = None
    baseline_memory_bytes: int | None = None
    load_us: float | None = None

    def request(self) -> dict[str, Any]:
        return {
            "name": self.artifact.name,
            "path": self.remote,
            "runtime": self.runtime,
            "layouts": [self.artifact.input_layout],
            "adapter": adapter_of(self.runtime),
            "threads": 1,
            "sha256": self.sha256,
        }


def plan(mode: Mode) -> Plan:
    """Return how long to measure.

    "quick" supports a p90 by MLPerf's early-stopping rule (64 samples), "full" a p99 (662) over ten seconds.

    Raises:
        ValueError: The mode is unknown.

    >>> plan("quick").min_runs, plan("full").min_runs
    (64, 662)
    """
    if mode == "quick":
        return Plan(mode=mode, min_runs=64, min_s=1.0, max_s=20.0, warmup_s=0.2, min_warmup_runs=10)
    if mode == "full":
        return Plan(mode=mode, min_runs=662, min_s=10.0, max_s=120.0, warmup_s=0.5, min_warmup_runs=10)
    raise ValueError(f"expected mode quick or full, got mode={mode!r}; give one of them")


def judge(samples_ns: npt.NDArray[np.int64], *, runs_per_sample: int = 1, steal_share: float | None = None) -> Latency:
    """Say what samples support.

    Args:
        samples_ns: ``(n,)`` positive nanoseconds per run, in order of time; at least one.
        runs_per_sample: How many consecutive runs a sample is the mean of.
        steal_share: Share of time, 0 to 1, that a hypervisor gave to others; None where unknown.

    Returns:
        Percentiles in microseconds (None where there are too few samples) with 95 % intervals, spread, drift, flags.

    Raises:
        ValueError: There is no sample, or one is not positive.

    >>> latency = judge(np.full(64, 5000))
    >>> latency.p50_us, latency.p90_us, latency.p99_us, latency.flags
    (5.0, 5.0, None, ())
    """
    samples_us = np.asarray(samples_ns, dtype=np.float64) / 1000
    if samples_us.ndim != 1 or not len(samples_us) or samples_us.min() <= 0:
        raise ValueError(f"expected positive samples_ns (n,), n >= 1, got shape={samples_us.shape}; measure again")
    p90_us = percentile_estimate(samples_us, 90)
    cv, moved = coefficient_of_variation(samples_us), drift(samples_us)
    raised = {
        "noisy": cv > _NOISY_CV,
        "drift": abs(moved) > _DRIFTING,
        "few-samples": p90_us is None,
        "averaged": runs_per_sample > 1,
        "steal": (steal_share or 0) > _STEAL_SHARE,
    }
    return Latency(
        p50_us=percentile_estimate(samples_us, 50),
        p90_us=p90_us,
        p99_us=percentile_estimate(samples_us, 99),
        ci={"p50_us": percentile_interval(samples_us, 50), "p90_us": percentile_interval(samples_us, 90)},
        min_us=float(samples_us.min()),
        n=len(samples_us),
        cv=round(cv, 4),
        drift=round(moved, 4),
        flags=tuple(flag for flag, is_raised in raised.items() if is_raised),
    )


def measure(
    device: Device,
    artifacts: Sequence[Artifact],
    inputs: npt.NDArray[np.float32],
    *,
    mode: Mode = "quick",
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure load time, memory and latency of model files on a device.

    Each artifact is first loaded and run in a process of its own (memory, load time). Those that survive are timed in
    one process per runtime, interleaved, so that a drift of the device is the same for all of them. An artifact
    that fails is reported and loses nobody else's numbers.

    Args:
        device: Where to measure.
        artifacts: Model files, no two of one name.
        inputs: ``(n, *shape)`` float32, preprocessed, channel first; real ones, since zeros and noise take other
            paths through a model. The first 256 are used.
        mode: "quick" or "full".
        progress: Called with a line for people before each step.

    Returns:
        ``{"schema_version", "device", "mode", "facts", "conditions", "artifacts": {name: ...}, "failed": {name:
        reason}}``, ready for ``json.dumps``. ``relative`` of an artifact is the ratio of its latency to that of the
        first one of its runtime, with a 95 % interval. ``samples_us`` are at most 256 evenly spaced order statistics.

    Raises:
        ValueError: Names repeat, the mode is unknown or the inputs are not float32 ``(n, *shape)``.
        ArtifactRefused: The device does not answer at all.
    """
    schedule, say = plan(mode), progress or _say_nothing
    names = [artifact.name for artifact in artifacts]
    if len(set(names)) != len(names):
        raise ValueError(f"expected artifacts of different names, got names={names}; rename one")
    if inputs.dtype != np.float32 or inputs.ndim < 2 or not len(inputs):
        found = f"inputs of {inputs.dtype} {inputs.shape}"
        raise ValueError(f"expected float32 inputs (n, *shape), n >= 1, got {found}; use Interface.preprocess")
    facts = believe_facts(device.facts())
    remote_inputs = _put_inputs(device, inputs[:_MAX_INPUTS])
    placed, failed = [], {}
    for artifact in artifacts:
        say(f"{artifact.name}: load time and memory")
        try:
            placed.append(_place(device, artifact, remote_inputs))
        except _REFUSALS as error:
            failed[artifact.name] = str(error)
    results: dict[str, dict[str, Any]] = {}
    conditions: dict[str, Any] = {}
    for runtime in dict.fromkeys(item.runtime for item in placed):
        group = [item for item in placed if item.runtime == runtime]
        say(f"{', '.join(item.artifact.name for item in group)}: latency in {runtime}, interleaved")
        timed, conditions[runtime], refused = _time_group(device, group, remote_inputs, schedule)
        failed |= refused
        results |= _results([item for item in group if item.artifact.name in timed], timed)
    return {
        "schema_version": SCHEMA_VERSION,
        "device": device.name,
        "mode": mode,
        "facts": facts,
        "conditions": conditions,
        "artifacts": {name: results[name] for name in names if name in results},
        "failed": {name: failed[name] for name in names if name in failed},
    }


def _say_nothing(message: str) -> None:
    del message


def _put_inputs(device: Device, inputs: npt.NDArray[np.float32]) -> str:
    with tempfile.TemporaryDirectory(prefix="tacit-") as scratch:
        staged = Path(scratch, "inputs.npy")
        np.save(staged, inputs, allow_pickle=False)
        return device.put(staged)


def _place(device: Device, artifact: Artifact, remote_inputs: str) -> _Placed:
    """Copy an artifact onto the device and let it prove in a process of its own that it runs."""
    found = examine(artifact.path)
    runtime = artifact.runtime or found
    sha256 = hashlib.sha256(artifact.path.read_bytes()).hexdigest()
    placed = _Placed(artifact=artifact, remote=device.put(artifact.path), runtime=runtime, sha256=sha256)
    request = {"op": "memory", "model": placed.request(), "inputs": [remote_inputs], "runs": _MEMORY_RUNS}
    started_s = time.monotonic()
    answer = device.run(request)
    wall_ns = int((time.monotonic() - started_s) * 1e9)
    memory = believe_memory(answer, wall_ns)
    return replace(
        placed,
        peak_memory_bytes=memory.peak_bytes,
        baseline_memory_bytes=memory.baseline_bytes,
        load_us=memory.load_ns / 1000,
    )


def _time_group(
    device: Device, group: list[_Placed], remote_inputs: str, schedule: Plan
) -> tuple[dict[str, Timed], dict[str, Any], dict[str, str]]:
    """Time artifacts together; if that fails, each alone, to find out whose fault it is."""
    request = {
        "op": "time",
        "models": [item.request() for item in group],
        "inputs": [remote_inputs],
        "limit_s": _LIMIT_MARGIN_S + len(group) * (schedule.warmup_s + 2 * schedule.max_s),
        **{key: value for key, value in asdict(schedule).items() if key != "mode"},
    }
    started_s = time.monotonic()
    try:
        answer = device.run(request)
        timed = believe_timings(answer, [item.artifact.name for item in group], time.monotonic() - started_s)
    except _REFUSALS as error:
        if len(group) == 1:
            return {}, {}, {group[0].artifact.name: str(error)}
    else:
        return timed, {moment: believe_facts(answer.get(moment)) for moment in ("before", "after")}, {}
    alone = [_time_group(device, [item], remote_inputs, schedule) for item in group]
    return (
        {name: timed for timings, _, _ in alone for name, timed in timings.items()},
        next((conditions for _, conditions, _ in alone if conditions), {}),
        {name: reason for _, _, refused in alone for name, reason in refused.items()},
    )


def _results(group: list[_Placed], timed: dict[str, Timed]) -> dict[str, dict[str, Any]]:
    return {item.artifact.name: _result(item, timed[item.artifact.name], group[0], timed) for item in group}


def _result(item: _Placed, timing: Timed, first: _Placed, timed: dict[str, Timed]) -> dict[str, Any]:
    latency = judge(timing.samples_ns, runs_per_sample=timing.runs_per_sample, steal_share=timing.steal_share)
    ordered_us = np.sort(timing.samples_ns) / 1000
    picks = np.linspace(0, len(ordered_us) - 1, min(len(ordered_us), _PLOT_POINTS)).round().astype(int)
    ratio = None if item is first else ratio_interval(timing.samples_ns, timed[first.artifact.name].samples_ns)
    return {
        "sha256": item.sha256,
        "runtime": item.runtime,
        **asdict(latency),
        "ci": {name: list(bounds) if bounds else None for name, bounds in latency.ci.items()},
        "flags": list(latency.flags),
        "load_us": item.load_us,
        "peak_memory_bytes": item.peak_memory_bytes,
        "baseline_memory_bytes": item.baseline_memory_bytes,
        "runs_per_sample": timing.runs_per_sample,
        "relative": None if ratio is None else {"to": first.artifact.name, **asdict(ratio)},
        "samples_us": ordered_us[picks].tolist(),
    }
