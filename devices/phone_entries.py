"""What the rounds of ``benchmark_model`` support: a result without samples, where what was not given is None."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from tacit.devices.benchmark_tool import Round
from tacit.devices.conditions import Conditions
from tacit.devices.entries import Entry
from tacit.devices.judgement import has_slowed
from tacit.devices.ratios import ratio_interval, student_t
from tacit.devices.statistics import Interval, drift, early_stopping_count, median_interval, standard_error

__all__ = ["relative_entry", "summary_entry"]

_NOISY_CV, _DRIFTING = 0.10, 0.05
_NO_SAMPLES = "benchmark_model gives summaries and no samples"
_TOLD = ("count", "min_us", "max_us", "mean_us", "std_us", "p5_us", "median_us", "p95_us")
# What this tool cannot tell, and other devices can.
_NEVER = (
    "baseline_memory_bytes", "steal_share", "waiting_share", "samples_us", "block_medians_us", "warmup", "sustained",
    "energy", "profile", "accuracy",
)  # fmt: skip


def summary_entry(rounds: Sequence[Round], before: Conditions, after: Conditions) -> Entry:
    """What the rounds of one artifact show together.

    ``cv`` is of all runs, the largest included. Clocks are read between runs, when the phone has nothing to do, and say
    nothing about throttling.
    """
    counts = np.array([one.count for one in rounds], dtype=np.float64)
    means = np.array([one.mean_us for one in rounds])
    squares = np.array([one.std_us**2 + one.mean_us**2 for one in rounds])
    total = counts.sum()
    mean = float(counts @ means / total)
    cv = math.sqrt(max(0.0, float(counts @ squares / total) - mean**2)) / mean
    typical = np.array([one.typical_us for one in rounds])
    moved, heat = drift(typical), [{"temperature_c": moment.get("temperature_c")} for moment in (before, after)]
    medians = [one.median_us for one in rounds if one.median_us and one.count >= early_stopping_count(50.0)]
    found = median_interval(np.array(medians), confidence=0.95) if len(medians) == len(rounds) else None
    half = student_t(len(means) - 1, 0.95) * standard_error(means)
    peaks = [one.peak_bytes for one in rounds if one.peak_bytes is not None]
    cold = _cold(rounds)
    raised = {
        "noisy": cv > _NOISY_CV,
        "drift": abs(moved) > _DRIFTING,
        "throttled": bool(after.get("thermal_status")) or (typical.min() > 0 and has_slowed(typical, *heat)),
        "governor": after.get("governor") not in (None, "performance") and not after.get("fixed_performance"),
    }
    return {
        "p50_us": found[0].estimate if found else None,
        **dict.fromkeys(("p90_us", "p99_us", "p999_us")),
        "ci": {
            "p50_us": [found[0].low, found[0].high] if found else None,
            **dict.fromkeys(("p90_us", "p99_us", "p999_us")),
            "mean_us": [mean - half, mean + half],
        },
        "mean_us": mean,
        "min_us": min(one.min_us for one in rounds) or None,  # 0 is less than the tool can see
        "n": int(total),
        "cv": round(cv, 4),
        "drift": round(moved, 4),
        "flags": [flag for flag, is_raised in raised.items() if is_raised],
        "runs_per_sample": 1,
        "input_source": "random",
        "cold": cold,
        "load_us": cold["load_us"]["estimate"] if cold else None,
        "peak_memory_bytes": max(peaks, default=None),
        **dict.fromkeys(_NEVER),
        "not_measured": dict.fromkeys(("p90_us", "p99_us", "p999_us", "samples_us"), _NO_SAMPLES),
        "rounds": [{name: value for name, value in asdict(one).items() if name in _TOLD} for one in rounds],
    }


def _cold(rounds: Sequence[Round]) -> Entry | None:
    """Each round is a fresh process; None where the tool does not say what its start took."""
    starts = [(one.init_us, one.first_us) for one in rounds if one.init_us is not None and one.first_us is not None]
    found = [median_interval(np.array(values)) for values in zip(*starts, strict=True)]
    told = [interval for interval in found if interval is not None]
    if len(told) != 2:
        return None
    intervals: list[Interval] = [interval for interval, _ in told]
    return {
        "n": len(starts),
        "page_cache": "warm",
        "confidence": min(confidence for _, confidence in told),
        **dict.fromkeys(("import_us", "total_us")),
        "load_us": asdict(intervals[0]),
        "first_us": asdict(intervals[1]),
    }


def relative_entry(rounds: Sequence[Round], first: Sequence[Round], name: str) -> Entry | None:
    """The ratio to another artifact, called so, of what is typical in rounds that ran one after the other."""
    a, b = (np.array([one.typical_us for one in each]) for each in (rounds, first))
    if min(a.min(), b.min()) <= 0:
        return None
    ratio = ratio_interval(a, b, block_samples=(1, 1))
    return None if ratio is None else {"to": name, **asdict(ratio)}
