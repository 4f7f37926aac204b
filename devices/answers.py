"""Judges what an agent answers: names, types, ranges, and no more work than the wall clock allows.

A device is not believed. Its answer is JSON that somebody else's program wrote.
"""

import json
import re
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tacit.devices.sandbox import ArtifactCrashed, ArtifactRefused

_MAX_BYTES = 1 << 50
_MAX_SAMPLES = 5_000_000
_MAX_FACTS, _MAX_FACT = 64, 1 << 63
_FACT = re.compile(r"[a-z0-9_]{1,40}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_SAID = 300


class DeviceUnreachable(ConnectionError):
    """A device cannot be reached, or no longer, or does not say what an agent says. A line: what, where, what to do."""


class DeviceFull(OSError):
    """A device has no room for a file; smaller ones may still fit."""


def printable(text: str) -> str:
    r"""A device's words for a line of ours: without control characters, and short.

    >>> printable("busy\x1b[2J\r\nnow " + "x" * 1000)[:13]
    'busy [2J now '
    """
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 4 * _SAID]).split())[:_SAID]


def read_answer(
    stdout: bytes, stderr: bytes, *, returncode: int, advice: str = "pip install 'tacit[devices]'"
) -> dict[str, Any]:
    """Read the last line of the agent's output.

    Args:
        stdout: All that it wrote, of bounded size.
        stderr: The end of what it wrote there.
        returncode: Its exit status; negative after a signal, as ``subprocess`` has it.
        advice: How to install a runtime that is missing on that device.

    Returns:
        The agent's answer, a JSON object of unchecked content.

    Raises:
        ArtifactCrashed: A signal ended the agent.
        ArtifactRefused: The model file could not be run, or the last line is no answer.
        ModuleNotFoundError: The runtime is not installed there.

    >>> read_answer(b'{"n": 7}', b"", returncode=0)
    {'n': 7}
    """
    if returncode < 0:
        known = -returncode in set(signal.Signals)
        name = signal.Signals(-returncode).name if known else f"signal {-returncode}"
        raise ArtifactCrashed(f"the model file crashed the runtime ({name})")
    lines = stdout.decode("utf-8", errors="replace").strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except (ValueError, RecursionError):
        answer = None
    said = stderr.decode("utf-8", errors="replace").strip()
    missing = _missing_module(answer, said) if returncode else None
    if missing is not None:
        raise ModuleNotFoundError(f"expected the runtime to be installed, got: {printable(missing)}; {advice}")
    if not isinstance(answer, dict):
        what = f"the runtime ended without an answer (exit status {returncode})"
        raise ArtifactRefused(f"{what}: {printable(said[-_SAID:])}")
    if returncode != 0:
        raise ArtifactRefused(f"the model file could not be run: {printable(str(answer.get('error')))}")
    return answer


def _missing_module(answer: object, said: str) -> str | None:
    """What could not be imported: a runtime, of which the agent speaks, or numpy, without which it does not."""
    if isinstance(answer, dict):
        return str(answer.get("error")) if answer.get("kind") == "ModuleNotFoundError" else None
    last, kind = said.rpartition("\n")[2], "ModuleNotFoundError: "
    return last.removeprefix(kind) if last.startswith(kind) else None


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What loading and running one artifact took; None where the device cannot say."""

    peak_bytes: int | None
    baseline_bytes: int | None
    load_ns: int


@dataclass(frozen=True, kw_only=True)
class Warmup:
    """What came before the timed runs; ``slope`` is how much the median moved in the last quarter of it."""

    runs: int
    spent_ns: int
    slope: float | None


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One artifact's samples, and what they were taken under."""

    samples_ns: npt.NDArray[np.int64]  # (n,), in order of time
    runs_per_sample: int
    steal_share: float | None
    block_samples: int | None = None  # how many were taken before another model had its turn
    warmup: Warmup | None = None
    disturbed: npt.NDArray[np.int64] | None = None  # the places of samples during which others had the processor


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
        peak_bytes=believe_integer(answer, "peak_memory_bytes", low=0, high=_MAX_BYTES) or None,
        baseline_bytes=believe_integer(answer, "baseline_bytes", low=0, high=_MAX_BYTES) or None,
        load_ns=believe_integer(answer, "load_ns", low=1, high=wall_ns),
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
                shown = _CONTROL.sub(" ", value[:_SAID])[:200]
                kept[key] = "".join(letter if letter.isprintable() else " " for letter in shown)
            elif value is None or (isinstance(value, int | float) and abs(value) < _MAX_FACT):  # which NaN is not
                kept[key] = value
    return kept


def _check_samples(entry: object, wall_ns: int, steal_share: float | None) -> Timed:
    samples = entry.get("samples_ns") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not isinstance(samples, list) or not 0 < len(samples) <= _MAX_SAMPLES:
        raise ArtifactRefused(f"expected a list of 1 to {_MAX_SAMPLES} samples_ns from the device; measure again")
    if not all(type(sample) is int and 0 < sample <= wall_ns for sample in samples):
        raise ArtifactRefused("expected positive integer samples_ns within the wall-clock time; measure again")
    return Timed(
        samples_ns=np.array(samples),
        runs_per_sample=believe_integer(entry, "runs_per_sample", low=1, high=10**6),
        steal_share=steal_share,
        block_samples=believe_integer(entry, "block_samples", low=1, high=10**6) if "block_samples" in entry else None,
        warmup=_check_warmup(entry["warmup"], wall_ns) if "warmup" in entry else None,
        disturbed=_check_places(entry["disturbed"], len(samples)) if "disturbed" in entry else None,
    )


def _check_places(places: object, count: int) -> npt.NDArray[np.int64]:
    if not isinstance(places, list) or not all(type(place) is int and 0 <= place < count for place in places):
        raise ArtifactRefused("expected the places of disturbed samples from the device, got others; measure again")
    return np.unique(np.array(places, dtype=np.int64))


def _check_warmup(entry: object, wall_ns: int) -> Warmup:
    slope = entry.get("slope") if isinstance(entry, dict) else None
    if not isinstance(entry, dict) or not (slope is None or (type(slope) is float and abs(slope) < 10**6)):
        raise ArtifactRefused("expected a warmup of runs, spent_ns and slope from the device; measure again")
    runs = believe_integer(entry, "runs", low=0, high=10**9)
    return Warmup(runs=runs, spent_ns=believe_integer(entry, "spent_ns", low=0, high=wall_ns), slope=slope)


def believe_integer(answer: dict[str, Any], key: str, *, low: int, high: int) -> int:
    """Return a whole number of an answer; raises ``ArtifactRefused`` where it is none or out of range."""
    value = answer.get(key)
    if type(value) is not int or not low <= value <= high:
        raise ArtifactRefused(f"expected {key} from {low} to {high} from the device, got another value; measure again")
    return value
