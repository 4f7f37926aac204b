"""Measures TFLite files on a phone by many short runs of ``benchmark_model``, interleaved, as its summaries support."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from tacit.devices.adb import AdbDevice
from tacit.devices.answers import DeviceFull, DeviceUnreachable, believe_facts
from tacit.devices.asking import identify
from tacit.devices.benchmark_tool import Round, Turn, believe_operators_csv, believe_round
from tacit.devices.conditions import Conditions
from tacit.devices.device import Artifact, Placed
from tacit.devices.entries import Entry, delegate_of, profile_entry, result_key
from tacit.devices.phone_entries import relative_entry, summary_entry
from tacit.devices.sandbox import ArtifactRefused
from tacit.devices.schedule import Mode, plan
from tacit.devices.statistics import early_stopping_count

__all__ = ["measure_phone"]

_SCHEMA_VERSION = 1
_TOOL = "benchmark_model"
_PROFILED = Turn(min_runs=50, warmup_s=0.2, min_s=0.0, max_s=30.0)
_ROUNDS: dict[Mode, int] = {"quick": 20, "full": 40}
_REFUSALS = (ArtifactRefused, FileNotFoundError, ModuleNotFoundError, DeviceFull)


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """How many processes of the tool run each artifact, and how long each."""

    rounds: int
    turn: Turn


@dataclass(kw_only=True)
class _Lane:
    """An artifact on the phone and what its rounds have shown so far."""

    placed: Placed
    rounds: list[Round] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.placed.artifact.name


def measure_phone(
    device: AdbDevice,
    artifacts: Sequence[Artifact],
    *,
    mode: Mode = "quick",
    profile: bool = False,
    known: Mapping[str, Entry] | None = None,
    keep: Callable[[str, Entry], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Measure TFLite files on a phone.

    Each artifact is run by 20 processes of the tool ("full": 40), the artifacts in turn and back again, so that a
    drift of the phone meets all alike, on the cores of its fastest clusters, in fixed performance mode where the phone
    has one. Its inputs are random values that the tool makes; ``input_source`` of each entry says so.

    Args:
        device: The phone.
        artifacts: Model files, no two of one name.
        mode: "quick" or "full".
        profile: Also the times of the operators, in a run of its own.
        known: Entries of earlier results, by their ``key``. Such an artifact is not measured again on the same phone.
        keep: Called with the name and the entry of each artifact as soon as it is complete.
        progress: Called with a line for people before each step.

    Returns:
        What ``protocol.measure`` returns, ready for ``json.dumps``. Samples are not given, and so neither are p90, p99
        and block medians: they are None, with the reason in ``not_measured``. ``p50_us`` is the median of the medians
        of the rounds, where the tool's version prints them and a round has the runs that support one; ``mean_us`` is
        the mean of all runs. Intervals come from the rounds.

    Raises:
        ValueError: Names repeat, or the mode is unknown.
        ModuleNotFoundError: The device was made without ``benchmark_model``.
        ArtifactRefused: That is for another processor.
        DeviceFull: The phone did not keep it.
        DeviceUnfit: The phone is too hot or too low.
        DeviceUnreachable: It is lost, or fixed performance mode could not be ended.
    """
    names = [artifact.name for artifact in artifacts]
    if len(set(names)) != len(names):
        raise ValueError(f"expected artifacts of different names, got names={names}; rename one")
    schedule, say = _schedule(mode), progress or (lambda message: None)
    facts, phone = believe_facts(device.facts()), device.identity()
    earlier = {key: entry for key, entry in (known or {}).items() if entry.get("phone") == phone}
    work = _Work(device=device, schedule=schedule, mode=mode, say=say, known=earlier, keep=keep)
    for artifact in artifacts:
        with work.blamed(artifact.name):
            work.take(artifact)
    conditions: dict[str, dict[str, Conditions]] = {}
    if work.waiting:
        device.require_tool()
        device.wait_until_fit(say)
        with device.fixed_performance(say) as is_fixed:
            for threads in dict.fromkeys(placed.artifact.threads for placed in work.waiting):
                group = [placed for placed in work.waiting if placed.artifact.threads == threads]
                label = _TOOL if threads == 1 else f"{_TOOL}, {threads} threads"
                conditions[label] = work.measure_group(label, group, is_fixed=is_fixed, profile=profile)
    before = next(iter(conditions.values()))["before"] if conditions else {}
    return {
        "schema_version": _SCHEMA_VERSION,
        "device": device.name,
        "mode": mode,
        "facts": {**facts, **before},
        "conditions": conditions,
        "artifacts": {name: work.entries[name] for name in names if name in work.entries},
        "failed": {name: work.failed[name] for name in names if name in work.failed},
    }


class _Work:
    """A measurement in progress: what is complete, and what failed."""

    def __init__(
        self,
        *,
        device: AdbDevice,
        schedule: _Schedule,
        mode: Mode,
        say: Callable[[str], None],
        known: Mapping[str, Entry],
        keep: Callable[[str, Entry], None] | None,
    ) -> None:
        self._device, self._schedule, self._mode, self._say = device, schedule, mode, say
        self._known, self._keep, self._phone = known, keep, device.identity()
        self.waiting: list[Placed] = []
        self.entries: dict[str, Entry] = {}
        self.failed: dict[str, str] = {}

    @contextmanager
    def blamed(self, name: str) -> Iterator[None]:
        """What goes wrong here is the fault of one artifact."""
        try:
            yield
        except _REFUSALS as error:
            self.failed[name] = str(error)

    def take(self, artifact: Artifact) -> None:
        """Look at an artifact on this computer; one that is known already is complete."""
        placed = identify(artifact)
        if placed.runtime != "litert":
            raise ArtifactRefused(f"expected a .tflite file for {_TOOL}, got path={artifact.path.name!r}; export one")
        key = self._key(placed)
        if key in self._known:
            self.entries[artifact.name] = self._known[key]
        else:
            self.waiting.append(placed)

    def measure_group(
        self, label: str, group: Sequence[Placed], *, is_fixed: bool, profile: bool
    ) -> dict[str, Conditions]:
        """Measure artifacts of as many threads in turn; what the phone was like before and after."""
        lanes: list[_Lane] = []
        for placed in group:
            with self.blamed(placed.artifact.name):
                lanes.append(_Lane(placed=replace(placed, remote=self._device.put(placed.artifact.path))))
        self._say(f"{', '.join(lane.name for lane in lanes)}: latency by {label}, interleaved")
        before, lost = self._device.conditions(), None
        cores = ",".join(map(str, self._device.cores(group[0].artifact.threads)))
        fixed: Conditions = {"fixed_performance": is_fixed, "cores": cores or None}
        try:
            self._run_in_turn(lanes)
            after = {**self._device.conditions(), **fixed}
        except DeviceUnreachable as error:
            lost, after = error, fixed
        lanes = [lane for lane in lanes if len(lane.rounds) == self._schedule.rounds]
        for lane in lanes:
            entry = self._entry(lane, lanes[0], before, after)
            self.entries[lane.name] = self._profiled(lane, entry) if profile and not lost else entry
            if self._keep is not None:
                self._keep(lane.name, self.entries[lane.name])
        if lost is not None:
            raise lost
        return {"before": {**before, **fixed}, "after": after}

    def _run_in_turn(self, lanes: Sequence[_Lane]) -> None:
        """A B C, C B A, A B C ...; one that fails is left out from then on."""
        for turn in range(self._schedule.rounds):
            for lane in reversed(lanes) if turn % 2 else lanes:
                if lane.name not in self.failed:
                    with self.blamed(lane.name):
                        lane.rounds.append(self._run(lane))

    def _run(self, lane: _Lane) -> Round:
        run = self._device.benchmark(lane.placed.remote, self._schedule.turn, threads=lane.placed.artifact.threads)
        return believe_round(run.said, run.wall_s)

    def _profiled(self, lane: _Lane, entry: Entry) -> Entry:
        """An entry with the times of the operators, in a file of this artifact's own."""
        threads, remote = lane.placed.artifact.threads, lane.placed.remote
        file = f"{remote.partition('.')[0]}{threads}.csv"
        self._say(f"{lane.name}: profile")
        try:
            run = self._device.benchmark(remote, _PROFILED, threads=threads, profile=file)
            runs = believe_round(run.said, run.wall_s).count
            text = self._device.get(file).decode("utf-8", errors="replace").replace("\r", "")
            found = believe_operators_csv(text, runs, run.wall_s)
        except ArtifactRefused as error:
            return {**entry, "not_measured": {**entry["not_measured"], "profile": str(error)}}
        return {**entry, "profile": {**profile_entry(found, 1), "runs": runs}}

    def _key(self, placed: Placed) -> str:
        return result_key(sha256=placed.sha256, runtime=_TOOL, mode=self._mode, threads=placed.artifact.threads)

    def _entry(self, lane: _Lane, first: _Lane, before: Conditions, after: Conditions) -> Entry:
        return {
            "key": self._key(lane.placed),
            "sha256": lane.placed.sha256,
            "runtime": _TOOL,
            "delegate": delegate_of(_TOOL),
            "phone": self._phone,
            "threads": lane.placed.artifact.threads,
            **summary_entry(lane.rounds, before, after),
            "relative": None if lane is first else relative_entry(lane.rounds, first.rounds, first.name),
        }


def _schedule(mode: Mode) -> _Schedule:
    """As many rounds as intervals from blocks need, and together at least the runs and seconds of the mode."""
    known = plan(mode)
    rounds = _ROUNDS[known.mode]
    turn = Turn(
        min_runs=max(early_stopping_count(50.0), math.ceil(known.min_runs / rounds)),
        warmup_s=known.warmup_s,
        min_s=known.min_s / rounds,
        max_s=known.max_s / rounds,
    )
    return _Schedule(rounds=rounds, turn=turn)
