"""What was timed on devices, as charts and tables of the report show it: rows, marks of runtimes, an axis' end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tacit.edge.svg import Point
from tacit.edge.wording import finite, plain

__all__ = [
    "MOST_CHARTED",
    "Mark",
    "Timing",
    "charted_devices",
    "devices_of",
    "end_of",
    "latency_limit",
    "marks_of",
    "timings_of",
]

MOST_CHARTED = 4  # devices with charts of size and latency
_FAR = 3.0  # times the 90th percentiles: what goes further would squash them


@dataclass(frozen=True)
class Mark:
    """How a runtime is drawn: a colour of the series, matplotlib's marker, filled or not, and the same as a letter."""

    series: int
    marker: str
    is_filled: bool
    letter: str


_MARKS = (
    Mark(0, "o", True, "●"),
    Mark(1, "D", True, "◆"),
    Mark(2, "^", True, "▲"),
    Mark(3, "s", True, "■"),
    Mark(0, "o", False, "○"),
    Mark(1, "D", False, "◇"),
    Mark(2, "^", False, "△"),
    Mark(3, "s", False, "□"),
)
# Those that one device may have differ in colour too; the browsers' are the hollow ones of what they were made from.
_KNOWN_RUNTIMES = (
    "onnxruntime",
    "litert",
    "executorch",
    "tflite-runtime",
    "onnxruntime-web",
    "LiteRT.js",
    "benchmark_model",
    "micro",
)


@dataclass(frozen=True)
class Timing:
    """One variant on one device; what was not measured is None."""

    variant: str
    device: str
    runtime: str
    p50_us: float
    p90_us: float | None
    p50_ci_us: Point | None
    p90_ci_us: Point | None
    size_bytes: float | None
    accuracy: float | None  # the task's metric
    is_wrong: bool = False  # the device computes something else than the file does where it was judged


# What there is to draw.


def timings_of(summary: Mapping[str, Any]) -> list[Timing]:
    """Return every median latency that was measured, in the order of the variants.

    Example:
        >>> small = {"name": "small", "latency": {"local": {"runtime": "litert", "p50_us": 42.0}}}
        >>> [(t.variant, t.device, t.runtime, t.p50_us) for t in timings_of({"variants": [small]})]
        [('small', 'local', 'litert', 42.0)]
    """
    timings = []
    for variant in summary["variants"]:
        for device, found in (variant.get("latency") or {}).items():
            p50_us = finite(found.get("p50_us")) if isinstance(found, Mapping) else None
            if p50_us is None:
                continue
            bounds = found.get("ci")
            interval = bounds if isinstance(bounds, Mapping) else {}
            timings.append(
                Timing(
                    variant=plain(variant.get("name")),
                    device=plain(device),
                    runtime=plain(found.get("runtime") or variant.get("format")),
                    p50_us=p50_us,
                    p90_us=finite(found.get("p90_us")),
                    p50_ci_us=_pair(interval.get("p50_us")),
                    p90_ci_us=_pair(interval.get("p90_us")),
                    size_bytes=finite(variant.get("bytes")),
                    accuracy=finite(variant.get("accuracy")),
                    is_wrong="departs" in flags if isinstance(flags := found.get("flags"), list) else False,
                )
            )
    return timings


def _pair(value: object) -> Point | None:
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (low, high)


def devices_of(timings: Sequence[Timing]) -> list[str]:
    """Return the devices, each once, in the order in which they appear.

    Example:
        >>> small = {"name": "small", "latency": {"phone": {"p50_us": 90.0}, "local": {"p50_us": 42.0}}}
        >>> devices_of(timings_of({"variants": [small, small]}))
        ['phone', 'local']
    """
    return list(dict.fromkeys(t.device for t in timings))


def charted_devices(timings: Sequence[Timing]) -> tuple[list[str], list[str]]:
    """Return the devices whose size and latency are drawn, and those that only the table has.

    Example:
        >>> latency = {name: {"p50_us": 42.0} for name in "abcdef"}
        >>> charted_devices(timings_of({"variants": [{"name": "small", "latency": latency}]}))
        (['a', 'b', 'c', 'd'], ['e', 'f'])
    """
    devices = devices_of(timings)
    return devices[:MOST_CHARTED], devices[MOST_CHARTED:]


def marks_of(timings: Sequence[Timing]) -> dict[str, Mark]:
    """Return how each runtime is drawn, in order of appearance: the same in all charts, no two alike before the ninth.

    Example:
        >>> latency = {"local": {"p50_us": 42.0}}
        >>> variants = [{"format": name, "latency": latency} for name in ("tflite-runtime", "own", "onnxruntime")]
        >>> {name: mark.letter for name, mark in marks_of(timings_of({"variants": variants})).items()}
        {'tflite-runtime': '■', 'own': '◆', 'onnxruntime': '●'}
    """
    runtimes = list(dict.fromkeys(t.runtime for t in timings))
    known = {name: mark for name, mark in zip(_KNOWN_RUNTIMES, _MARKS, strict=True) if name in runtimes}
    free = [mark for mark in _MARKS if mark not in known.values()] or list(_MARKS)
    others = [name for name in runtimes if name not in known]
    found = known | {name: free[place % len(free)] for place, name in enumerate(others)}
    return {name: found[name] for name in runtimes}


def latency_limit(timings: Sequence[Timing]) -> float | None:
    """Return the microseconds at which a chart of latency ends, where bounds far beyond all others would squash it.

    What ends within three times the largest 90th percentile is whole; a 90th percentile counts up to six medians.

    Example:
        >>> def with_bound(high_us):
        ...     ci = {"p90_us": [25.0, high_us]}
        ...     return {"name": "a", "latency": {"local": {"p50_us": 20.0, "p90_us": 28.0, "ci": ci}}}
        >>> latency_limit(timings_of({"variants": [with_bound(29.0), with_bound(21656.0)]}))
        35.0
        >>> latency_limit(timings_of({"variants": [with_bound(29.0), with_bound(60.0)]})) is None
        True
    """
    if not timings:
        return None
    slowest = max(t.p50_us for t in timings)
    core = max([slowest, *(t.p90_us for t in timings if t.p90_us is not None and t.p90_us <= 6 * slowest)])
    ends = [end_of(t) for t in timings]
    near = [end for end in ends if end <= _FAR * core]
    return None if len(near) == len(ends) else max([1.25 * core, *near])


def end_of(timing: Timing) -> float:
    """How far a row reaches."""
    bounds: list[float] = [*(timing.p50_ci_us or ()), *(timing.p90_ci_us or ())]
    return max([timing.p50_us, timing.p90_us or 0.0, *bounds])
