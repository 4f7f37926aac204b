"""Judges what an agent answers: names, types, ranges, and no more work than the wall clock allows.

A device is not believed. Its answer is JSON that somebody else's program wrote.
"""

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tacit.devices.sandbox import ArtifactRefused

_MAX_BYTES = 1 << 50
_MAX_SAMPLES = 5_000_000
_MAX_FACTS = 64
_FACT = re.compile(r"[a-z0-9_]{1,40}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What loading and running one artifact took; None where the device cannot say."""

    peak_bytes: int | None
    baseline_bytes: int | None
    load_ns: int


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One artifact's samples, and what they were taken under."""

    samples_ns: npt.NDArray[np.int64]  # (n,), in order of time
    runs_per_sample: int
    steal_share: float | None


def believe_memory(answer: dict[str, Any], wall_ns: int) -> Memory:
    """Check the answer to ``memory``: loading cannot have taken longer than the whole request took here.

    Args:
        answer: What the agent sent.
        wall_ns: Nanoseconds from sending the request to its answer, by this computer's clock.

    Raises:
        ArtifactRefused: A figure is missing, of another type or out of range.

    >>> believe_memory({"peak_memory_bytes": 4096, "baseline_bytes": 0, "load_ns": 500}, wall_ns=1000)
    Memory(peak_bytes=4096, baseline_bytes=None, load_ns=500)
    """
    return Memory(
        peak_bytes=_integer(answer, "peak_memory_bytes", low=0, high=_MAX_BYTES) or None,
        baseline_bytes=_integer(answer, "baseline_bytes", low=0, high=_MAX_BYTES) or None,
        load_ns=_integer(answer, "load_ns", low=1, high=wall_ns),
    )


def believe_timings(answer: dict[str, Any], names: list[str], wall_s: float) -> dict[str, Timed]:
    """Check the answer to ``time``: believe a device no more than the wall-clock time allows.

    Args:
        answer: What the agent sent.
        names: The artifacts that were to be timed; it must name exactly these.
        wall_s: Seconds from sending the request to its answer, by this computer's clock.

    Raises:
        ArtifactRefused: A figure cannot be true, or is of another type.

    >>> answer = {"models": {"small": {"samples_ns": [500, 700], "runs_per_sample": 1}}}
    >>> believe_timings(answer, ["small"], wall_s=0.001)["small"].samples_ns.tolist()
    [500, 700]
    >>> believe_timings(answer, ["small"], wall_s=0.000001)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    tacit.devices.sandbox.ArtifactRefused: expected at most 0.000 s of timed work, ...
    """
    models = answer.get("models")
    if not isinstance(models, dict) or set(models) != set(names):
        raise ArtifactRefused(f"expected timings of {names} from the device, got others; measure again")
    steal_share = answer.get("steal_share")
    if steal_share is not None and not (isinstance(steal_share, int | float) and 0 <= steal_share <= 1):
        raise ArtifactRefused("expected steal_share between 0 and 1 from the device, got another value; measure again")
    wall_ns = int(wall_s * 1e9)
    timed = {name: _check_samples(models[name], wall_ns, steal_share) for name in names}
    claimed_ns = sum(int(entry.samples_ns.sum()) * entry.runs_per_sample for entry in timed.values())
    if claimed_ns > wall_ns:
        raise ArtifactRefused(
            f"expected at most {wall_s:.3f} s of timed work, got claimed_s={claimed_ns / 1e9:.3f}; "
            "do not trust this device's clock or agent"
        )
    return timed


def believe_facts(facts: object) -> dict[str, str | int | float | None]:
    r"""Keep what a report may show of a device's own words: few, flat, short and without control characters.

    >>> believe_facts({"cpu": "ARM\x1b[2J", "cores": 4, "../key": 1, "nested": {}})
    {'cpu': 'ARM [2J', 'cores': 4}
    """
    kept: dict[str, str | int | float | None] = {}
    for key, value in list(facts.items())[:_MAX_FACTS] if isinstance(facts, dict) else []:
        if isinstance(key, str) and _FACT.fullmatch(key):
            if isinstance(value, str):
                kept[key] = _CONTROL.sub(" ", value)[:200]
            elif value is None or (isinstance(value, int | float) and math.isfinite(value)):
                kept[key] = value
    return kept


def _check_samples(entry: object, wall_ns: int, steal_share: float | None) -> Timed:
    samples = entry.get("samples_ns") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(samples, list) or not 0 < len(samples) <= _MAX_SAMPLES:
        raise ArtifactRefused(f"expected a list of 1 to {_MAX_SAMPLES} samples_ns from the device; measure again")
    if not all(type(sample) is int and 0 < sample <= wall_ns for sample in samples):
        raise ArtifactRefused("expected positive integer samples_ns within the wall-clock time; measure again")
    runs_per_sample = _integer(entry, "runs_per_sample", low=1, high=10**6)
    return Timed(samples_ns=np.array(samples), runs_per_sample=runs_per_sample, steal_share=steal_share)


def _integer(answer: dict[str, Any], key: str, *, low: int, high: int) -> int:
    value = answer.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ArtifactRefused(f"expected {key} from {low} to {high} from the device, got another value; measure again")
    return value
