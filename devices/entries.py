"""What a result says of one artifact, ready for JSON: what was not measured is None, never 0."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from tacit.devices.answers import Timed
from tacit.devices.asking import Sustained, TimedGroup
from tacit.devices.device import Placed
from tacit.devices.judgement import has_slowed, judge
from tacit.devices.ratios import Series, block_medians, joined_ratio, log_ratios, ratio_interval, student_t, thinned
from tacit.devices.side_answers import ColdStart, Operator
from tacit.devices.statistics import (
    BLOCK_COUNTS,
    median_interval,
    percentile_estimate,
    standard_error,
    wilson_interval,
)

Entry = dict[str, Any]
_DELEGATES = {
    "onnxruntime": "CPUExecutionProvider",
    "onnxruntime-web": "wasm",
    "litert": "XNNPACK, its default",
    "litert.js": "wasm",
    "tflite-runtime": "its default",
    "executorch": "as the file was lowered",
    "benchmark_model": "its default",
}
_PLOT_POINTS = 256
_BLOCK_MEDIANS = 512
_LEAST_SECONDS = 3
_LISTED_OPERATORS = 32


def result_key(*, sha256: str, runtime: str, mode: str, threads: int) -> str:
    """Return what a result is of: one with the same key need not be measured again on the same device.

    >>> result_key(sha256="ab", runtime="litert", mode="quick", threads=1)
    'ab-litert-quick-1'
    """
    return f"{sha256}-{runtime}-{mode}-{threads}"


def delegate_of(runtime: str) -> str | None:
    """What computes for a runtime, as it is opened for a measurement: of the same build and version as that.

    >>> delegate_of("onnxruntime")
    'CPUExecutionProvider'
    """
    return _DELEGATES.get(runtime)


def key_of(placed: Placed, mode: str) -> str:
    """The key of an artifact's result."""
    return result_key(sha256=placed.sha256, runtime=placed.runtime, mode=mode, threads=placed.artifact.threads)


def entry_of(placed: Placed, group: TimedGroup, reference: Placed, mode: str) -> Entry:
    """What one artifact's own runs and the timed run show; ``relative`` to another one of the same run."""
    name, first = placed.artifact.name, reference.artifact.name
    timings = group.timed[name]
    samples_ns = np.concatenate([timing.samples_ns for timing in timings])
    runs_per_sample = max(timing.runs_per_sample for timing in timings)
    steal_share = max((timing.steal_share for timing in timings if timing.steal_share is not None), default=None)
    latency = judge(
        samples_ns,
        runs_per_sample=runs_per_sample,
        steal_share=steal_share,
        before=group.before,
        after=group.after,
        waiting_share=group.waiting_share,
    )
    ordered_us = np.sort(samples_ns) / 1000
    picks = np.linspace(0, len(ordered_us) - 1, min(len(ordered_us), _PLOT_POINTS)).round().astype(int)
    memory, warmups = placed.memory, [timing.warmup for timing in timings if timing.warmup is not None]
    cold = cold_entry(placed.cold)
    load_us = cold["load_us"]["estimate"] if cold else memory.load_ns / 1000 if memory else None
    return {
        "key": key_of(placed, mode),
        "sha256": placed.sha256,
        "runtime": placed.runtime,
        "delegate": delegate_of(placed.runtime),
        "threads": placed.artifact.threads,
        **asdict(latency),
        "ci": {percentile: list(bounds) if bounds else None for percentile, bounds in latency.ci.items()},
        "flags": list(latency.flags),
        "load_us": load_us,
        "peak_memory_bytes": memory.peak_bytes if memory else None,
        "baseline_memory_bytes": memory.baseline_bytes if memory else None,
        "runs_per_sample": runs_per_sample,
        "steal_share": steal_share,
        "waiting_share": group.waiting_share,
        "relative": None if name == first else _relative(group, name, first),
        "samples_us": ordered_us[picks].tolist(),
        "processes": len(timings),
        "undisturbed": _undisturbed(timings),
        "block_medians_us": _block_medians_us(timings),
        "warmup": [{"runs": one.runs, "s": one.spent_ns / 1e9, "slope": one.slope} for one in warmups] or None,
        "cold": cold,
        "sustained": None,
        "energy": None,
        "profile": None,
        "accuracy": None,
    }


def _undisturbed(timings: Sequence[Timed]) -> Entry | None:
    """The runs that no other program interrupted; None where the device cannot tell."""
    calm_us = [np.delete(one.samples_ns, one.disturbed) / 1000 for one in timings if one.disturbed is not None]
    joined_us = np.concatenate(calm_us) if calm_us else np.zeros(0)
    if len(calm_us) < len(timings):
        return None
    return {"n": len(joined_us), "p50_us": percentile_estimate(joined_us, 50) if len(joined_us) else None}


def _block_medians_us(timings: Sequence[Timed]) -> list[float]:
    """Of undisturbed runs, if they are enough to compare with another session."""
    calm = [block_medians(one.samples_ns, one.block_samples or 1, one.disturbed) for one in timings]
    if np.isfinite(np.concatenate(calm)).sum() < BLOCK_COUNTS[0]:
        calm = [block_medians(one.samples_ns, one.block_samples or 1) for one in timings]
    return [float(f"{median / 1000:.5g}") for median in thinned(np.concatenate(calm), _BLOCK_MEDIANS)]


def _relative(group: TimedGroup, name: str, first: str) -> Entry | None:
    pairs = list(zip(group.timed[name], group.timed.get(first, []), strict=False))
    if not pairs:
        return None
    if not all(one.block_samples and base.block_samples for one, base in pairs):
        # A device that does not tell its blocks; then only shares of the session can be paired.
        ratio = ratio_interval(*(np.concatenate([pair[side].samples_ns for pair in pairs]) for side in (0, 1)))
    else:
        ratio = joined_ratio([_log_ratios(*pair, least=-(-BLOCK_COUNTS[0] // len(pairs))) for pair in pairs])
    return None if ratio is None else {"to": first, **asdict(ratio)}


def _log_ratios(timing: Timed, base: Timed, *, least: int) -> Series:
    calm = None
    if timing.disturbed is not None and base.disturbed is not None:
        calm = (timing.disturbed, base.disturbed)
    blocks = (timing.block_samples or 1, base.block_samples or 1)
    return log_ratios(timing.samples_ns, base.samples_ns, block_samples=blocks, disturbed=calm, least=least)


def cold_entry(starts: Sequence[ColdStart]) -> Entry | None:
    """Medians over fresh processes of importing the runtime, loading and the first inference, with intervals.

    >>> starts = [ColdStart(import_ns=10**7, load_ns=10**6 * n, first_ns=10**5) for n in (5, 3, 4, 2, 1)]
    >>> cold_entry(starts)["load_us"]
    {'estimate': 3000.0, 'low': 1000.0, 'high': 5000.0}
    """
    if not starts:
        return None
    parts = {name: np.array([getattr(start, f"{name}_ns") / 1000 for start in starts]) for name in _PARTS}
    parts["total"] = sum(parts.values(), start=np.zeros(len(starts)))
    found = {name: median_interval(values) for name, values in parts.items()}
    confidence = [interval[1] for interval in found.values() if interval is not None]
    return {
        "n": len(starts),
        "page_cache": "warm",
        "confidence": min(confidence, default=None),
        **{
            f"{name}_us": asdict(interval[0])
            if interval is not None
            else {"estimate": float(np.median(parts[name])), "low": None, "high": None}
            for name, interval in found.items()
        },
    }


_PARTS = ("import", "load", "first")


def sustained_entry(run: Sustained) -> Entry | None:
    """The curve of a sustained run; None where there is none."""
    busy = [(bucket, conditions) for bucket, conditions in zip(run.buckets, run.conditions, strict=True) if bucket.runs]
    if not busy:
        return None
    medians_us = np.array([bucket.median_us for bucket, _ in busy])
    # A tenth at either end, and of a short run what a spread can be told of.
    end = max(1, len(medians_us) // 10, min(3, len(medians_us) // 3))
    change = float(np.median(medians_us[-end:]) / np.median(medians_us[:end]))
    return {
        "asked_s": run.asked_s,
        "start_s": [round(bucket.start_s - busy[0][0].start_s, 3) for bucket, _ in busy],
        "median_us": medians_us.tolist(),
        "runs": [bucket.runs for bucket, _ in busy],
        "temperature_c": [conditions.get("temperature_c") for _, conditions in busy],
        "cur_freq_khz": [conditions.get("cur_freq_khz") for _, conditions in busy],
        "change": round(change - 1, 4),
        "change_ci": _change_interval(change, medians_us[:end], medians_us[-end:]),
        "throttled": has_slowed(medians_us, run.start, busy[-1][1]),
        "steal_share": run.steal_share,
        "waiting_share": run.waiting_share,
    }


def _change_interval(change: float, first_us: Series, last_us: Series) -> list[float] | None:
    """What the spread of the seconds at either end leaves open of the change between them, at 95 %."""
    if len(first_us) < _LEAST_SECONDS:
        return None
    error = float(np.hypot(standard_error(np.log(first_us)), standard_error(np.log(last_us))))
    reach = student_t(len(first_us) - 1, 0.95) * error
    return [round(change * math.exp(side * reach) - 1, 4) for side in (-1, 1)]


def profile_entry(found: Sequence[Operator], runs: int) -> Entry:
    """Mean microseconds of each operator in one run of the model, the longest first."""
    listed: list[Entry] = [
        {"name": one.name, "type": one.kind, "count": one.count, "us": one.total_ns / 1000 / runs} for one in found
    ]
    by_type: dict[str, float] = {}
    for row in listed:
        by_type[row["type"]] = by_type.get(row["type"], 0.0) + row["us"]
    return {
        "runs": runs,
        "by_type_us": dict(sorted(by_type.items(), key=lambda pair: -pair[1])),
        "operators": listed[:_LISTED_OPERATORS],
        "us": sum(by_type.values()),
    }


def accuracy_entry(
    outputs: npt.NDArray[Any], labels: npt.NDArray[Any] | None, expected: npt.NDArray[Any] | None
) -> Entry:
    """Accuracy of outputs ``(n, classes)`` by labels ``(n,)``, and how often they agree with the expected ones.

    >>> accuracy_entry(np.eye(3), np.array([0, 1, 0]), None)["top1"]["estimate"]
    0.6666666666666666
    """
    decided = outputs.reshape(len(outputs), -1).argmax(axis=1)
    entry: Entry = {"n": len(outputs), "top1": None, "agreement": None, "max_abs": None}
    if labels is not None:
        entry["top1"] = asdict(wilson_interval(int((decided == labels).sum()), len(labels)))
    if expected is not None:
        same = int((decided == expected.reshape(len(expected), -1).argmax(axis=1)).sum())
        entry["agreement"] = asdict(wilson_interval(same, len(expected)))
        entry["max_abs"] = float(np.abs(outputs.astype(np.float64) - expected).max())
    return entry


def flagged(entry: Mapping[str, Any], flag: str) -> Entry:
    """An entry with one more flag."""
    return {**entry, "flags": [*(old for old in entry["flags"] if old != flag), flag]}
