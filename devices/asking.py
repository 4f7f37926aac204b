"""The runs that a measurement is made of: memory, cold starts, timed, sustained, profile; asked for and checked."""

import hashlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tacit.devices.answers import Memory, Timed, believe_facts, believe_memory, believe_timings
from tacit.devices.conditions import (
    Conditions,
    Readings,
    believe_readings,
    interpret,
    steal_share,
    waiting_share,
    watch,
)
from tacit.devices.device import Artifact, Device, Placed
from tacit.devices.energy import battery_files, energy_of, rest_s
from tacit.devices.formats import examine
from tacit.devices.runtime import read_outputs
from tacit.devices.sandbox import ArtifactRefused
from tacit.devices.schedule import Plan
from tacit.devices.side_answers import Bucket, ColdStart, Operator, believe_buckets, believe_cold, believe_operators

Values = npt.NDArray[Any]
# What is the artifact's fault, or of what it needs; anything else is the device's and ends the measurement.
REFUSALS = (ArtifactRefused, FileNotFoundError, ModuleNotFoundError)


@dataclass(frozen=True, kw_only=True)
class Session:
    """A device with the inputs that it will be asked to run."""

    device: Device
    inputs: tuple[str, ...]
    schedule: Plan
    affinity: object = None

    def ask(self, op: str, **request: Any) -> tuple[dict[str, Any], float]:
        """An answer, and the seconds that it took by this computer's clock."""
        started_s = time.monotonic()
        answer = self.device.run({"op": op, "inputs": list(self.inputs), **request})
        return answer, time.monotonic() - started_s

    def describe(self, placed: Placed) -> dict[str, Any]:
        """What requests say of an artifact."""
        return placed.request(len(self.inputs))


@dataclass(frozen=True, kw_only=True)
class TimedGroup:
    """What artifacts that were timed together showed, and under what conditions; ``failed`` says why some were not."""

    timed: dict[str, list[Timed]]  # of each process in turn
    before: Conditions
    after: Conditions
    failed: dict[str, str]
    waiting_share: float | None = None


@dataclass(frozen=True, kw_only=True)
class Sustained:
    """A sustained run: its buckets, those of rest first, with what was read at the end of each, and its energy."""

    buckets: list[Bucket]
    start: Conditions  # of the first bucket with runs
    conditions: list[Conditions]
    asked_s: float
    energy: dict[str, Any] | None = None
    why_no_energy: str = ""
    steal_share: float | None = None
    waiting_share: float | None = None


def put_inputs(device: Device, inputs: Sequence[Values]) -> tuple[str, ...]:
    """Copy arrays onto the device."""
    remote = []
    with tempfile.TemporaryDirectory(prefix="tacit-") as scratch:
        for place, values in enumerate(inputs):
            staged = Path(scratch, f"inputs{place}.npy")
            np.save(staged, values, allow_pickle=False)
            remote.append(device.put(staged))
    return tuple(remote)


def identify(artifact: Artifact) -> Placed:
    """Look at a file before any device sees it; raises what ``examine`` does."""
    found = examine(artifact.path)
    sha256 = hashlib.sha256(artifact.path.read_bytes()).hexdigest()
    return Placed(artifact=artifact, runtime=artifact.runtime or found, sha256=sha256)


def place(session: Session, known: Placed, *, starts: bool = True) -> Placed:
    """Copy an artifact onto the device and let it prove in processes of its own that it runs."""
    placed = replace(known, remote=session.device.put(known.artifact.path))
    if not starts:
        return placed
    request = {"model": session.describe(placed), "runs": session.schedule.memory_runs}
    answer, wall_s = session.ask("memory", **request)
    memory: Memory = believe_memory(answer, int(wall_s * 1e9))
    # What the first process read from the disk, the next ones find in memory: the page cache is warm for all of them.
    return replace(placed, memory=memory, cold=_cold_starts(session, placed))


def _cold_starts(session: Session, placed: Placed) -> tuple[ColdStart, ...]:
    starts = []
    try:
        for _ in range(session.schedule.cold_runs):
            answer, wall_s = session.ask("cold", model=session.describe(placed), runs=1)
            starts.append(believe_cold(answer, int(wall_s * 1e9)))
    except ArtifactRefused:
        return ()  # a device that only times; the artifact itself has run
    return tuple(starts)


def time_group(session: Session, group: Sequence[Placed]) -> TimedGroup:
    """Time artifacts together; if that fails, each alone, to find out whose fault it is."""
    try:
        processes = [_time_in_a_process(session, group) for _ in range(session.schedule.processes)]
    except REFUSALS as error:
        if len(group) == 1:
            return TimedGroup(timed={}, before={}, after={}, failed={group[0].artifact.name: str(error)})
        return _joined([time_group(session, [placed]) for placed in group])
    return _joined(processes)


def _time_in_a_process(session: Session, group: Sequence[Placed]) -> TimedGroup:
    request = {"models": [session.describe(placed) for placed in group], "watch": watch(session.affinity)}
    answer, wall_s = session.ask("time", **request, **session.schedule.timed(len(group)))
    timed = believe_timings(answer, [placed.artifact.name for placed in group], wall_s)
    before, after, readings = _moments(answer)
    stolen = steal_share(*readings)
    return TimedGroup(
        timed={name: [one if stolen is None else replace(one, steal_share=stolen)] for name, one in timed.items()},
        before=before,
        after=after,
        failed={},
        waiting_share=waiting_share(*readings),
    )


def _joined(groups: Sequence[TimedGroup]) -> TimedGroup:
    timed: dict[str, list[Timed]] = {}
    for group in groups:
        for name, found in group.timed.items():
            timed.setdefault(name, []).extend(found)
    ran = [group for group in groups if group.timed] or [groups[0]]
    return TimedGroup(
        timed=timed,
        before=ran[0].before,
        after=ran[-1].after,
        failed={name: reason for group in groups for name, reason in group.failed.items()},
        waiting_share=max((group.waiting_share for group in ran if group.waiting_share is not None), default=None),
    )


def _moments(answer: dict[str, Any]) -> tuple[Conditions, Conditions, tuple[Readings, Readings]]:
    """What a device was like before and after, by its files or in its own words."""
    before, after = believe_facts(answer.get("before")), believe_facts(answer.get("after"))
    readings = _readings(answer, 2)
    if readings is None:
        return before, after, ({}, {})
    first, last = readings
    return _with(interpret(first), before), _with(interpret(last), after), (first, last)


def _with(read: Conditions, told: Conditions) -> Conditions:
    """What files hold, and a device's own words where it has some."""
    return {**read, **{name: value for name, value in told.items() if value is not None or name not in read}}


def _readings(answer: dict[str, Any], count: int) -> list[Readings] | None:
    rows = answer.get("readings")
    return [believe_readings(row) for row in rows] if isinstance(rows, list) and len(rows) == count else None


def sustain(session: Session, placed: Placed, seconds: float) -> Sustained:
    """Run one artifact for minutes; where the device can tell its energy, after a rest."""
    patterns = [*watch(session.affinity, everything=False), *battery_files()]
    look, _ = session.ask("facts", watch=patterns)
    readings = _readings(look, 1) or [{}]
    request = session.schedule.sustained(seconds, rest_s(readings[0], seconds))
    answer, wall_s = session.ask("sustain", model=session.describe(placed), watch=patterns, **request)
    buckets = believe_buckets(answer, wall_s)
    found = _readings(answer, len(buckets) + 1) or [{}] * (len(buckets) + 1)
    first = next((place for place, bucket in enumerate(buckets) if bucket.runs), 0)
    energy, why = energy_of(buckets, found)
    return Sustained(
        buckets=buckets,
        start=interpret(found[first]),
        conditions=[interpret(row) for row in found[1:]],
        asked_s=seconds,
        energy=energy,
        why_no_energy=why,
        steal_share=steal_share(found[first], found[-1]),
        waiting_share=waiting_share(found[first], found[-1]),
    )


def operators(session: Session, placed: Placed) -> list[Operator] | None:
    """Where an artifact's time goes; None where its runtime has no profiler."""
    answer, wall_s = session.ask("profile", model=session.describe(placed), runs=session.schedule.profile_runs)
    return believe_operators(answer, int(wall_s * 1e9))


def predict(session: Session, placed: Placed, count: int) -> Values:
    """The first output for all inputs, by the artifact itself where it was timed."""
    session.ask("predict", model=session.describe(placed), outputs=["outputs.npy"])
    return read_outputs(session.device.get("outputs.npy"), count=count)
